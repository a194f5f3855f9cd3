//! Firecracker: API client and process supervision.
