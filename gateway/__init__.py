"""Route OpenAI HTTP and gRPC requests from clients to engine endpoints, with no Ray on the way."""
