"""Act: carry a plan out on Ray: inventory, engines, replicas, scaling, the command line."""
