//! The published E2B SDKs, unmodified, straight at one envd: their debug mode. Their tests are in `tests/sdk`.

use end_to_end::{Envd, Sdk};
use serde_json::json;

async fn passes(sdk: Sdk, file: &str) {
    let envd = Envd::start().await;
    sdk.test(file, &[("E2B_DEBUG", "true"), ("E2B_SANDBOX_URL", &envd.url())]);
}

#[tokio::test]
async fn python() {
    passes(Sdk::Python, "test_e2b.py").await;
}

#[tokio::test]
async fn asynchronous_python() {
    passes(Sdk::Python, "test_e2b_async.py").await;
}

#[tokio::test]
async fn javascript() {
    passes(Sdk::JavaScript, "e2b.test.cjs").await;
}

#[tokio::test]
async fn signed_urls() {
    let envd = Envd::start_with(json!({"defaultUser": "user", "accessToken": "a-token"})).await;
    Sdk::Python.test("test_e2b_signed.py", &[("E2B_SANDBOX_URL", &envd.url()), ("ENVD_TOKEN", "a-token")]);
}
