"""The gRPC API: `inference.proto` and what protoc makes of it (`make proto`)."""
