//! The fake agent keeps what agents promise, over a socket file and over TCP.

use testkit::FakeAgent;
use testkit::agent_conformance::{Subject, all};
use testkit::fake_agent::IMAGE;

#[tokio::test]
async fn over_a_socket_file() {
    let agent = FakeAgent::start().await;
    all(&Subject { endpoint: agent.endpoint(), image: IMAGE.into() }).await;
    assert!(agent.alive().is_empty());
}

#[tokio::test]
async fn over_tcp() {
    let mut agent = FakeAgent::start().await;
    let endpoint = agent.listen_tcp().await;
    all(&Subject { endpoint, image: IMAGE.into() }).await;
    assert!(agent.alive().is_empty());
}
