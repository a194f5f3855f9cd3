//! Real parts for tests, and a fake of the whole host agent for where a real one cannot be.
//!
//! Nothing here mocks: a PostgreSQL is PostgreSQL, and the fake agent speaks the agent's whole contract over a real socket and
//! has a real envd in each capsule.
//! What it promises is written down as [`agent_conformance`], which the real agent passes too.

pub mod agent_conformance;
pub mod fake_agent;
pub mod postgres;
pub mod s3;

pub use fake_agent::FakeAgent;
pub use postgres::Postgres;
pub use s3::{Fault, S3};
