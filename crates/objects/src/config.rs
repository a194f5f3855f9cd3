//! Which object store, as an operator says it.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::AmazonS3Builder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{BackoffConfig, ClientOptions, ObjectStore, RetryConfig};

use crate::Error;

/// How long one request may take. A chunk is a megabyte.
const REQUEST: Duration = Duration::from_secs(30);
const CONNECT: Duration = Duration::from_secs(5);
/// A request that fails is tried so often again, within that time. Who needs more patience tries again himself.
const RETRIES: usize = 3;
const RETRY_FOR: Duration = Duration::from_secs(10);

/// An address and what goes with it.
#[derive(Clone, PartialEq, Eq)]
pub struct Config {
    address: String,
    place: Place,
    /// The `AWS_*` variables.
    environment: BTreeMap<String, String>,
}

#[derive(Clone, PartialEq, Eq)]
enum Place {
    Folder(PathBuf),
    Bucket { bucket: String, prefix: String },
}

impl Config {
    /// Understands `file:///path` and `s3://bucket` or `s3://bucket/prefix`. Of `environment` the standard `AWS_*` variables
    /// count, `AWS_ENDPOINT_URL` among them, and only for S3.
    pub fn parse(address: &str, environment: impl IntoIterator<Item = (String, String)>) -> Result<Self, Error> {
        let refused = || Error::Address(address.to_owned());
        let (place, environment) = if let Some(path) = address.strip_prefix("file://") {
            let path = PathBuf::from(path);
            (path.is_absolute().then_some(Place::Folder(path)).ok_or_else(refused)?, BTreeMap::new())
        } else {
            let rest = address.strip_prefix("s3://").ok_or_else(refused)?;
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            let prefix = prefix.trim_matches('/').to_owned();
            if bucket.is_empty() || Path::parse(&prefix).is_err() {
                return Err(refused());
            }
            let environment = environment.into_iter().filter(|(name, _)| name.starts_with("AWS_")).collect();
            (Place::Bucket { bucket: bucket.to_owned(), prefix }, environment)
        };
        Ok(Self { address: address.to_owned(), place, environment })
    }

    /// The address, as it was given.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// What tells one object store from another: the address, and where an endpoint is given, that. It has no secrets.
    pub fn identity(&self) -> String {
        let endpoints = self.environment.iter().filter(|(name, _)| name.starts_with("AWS_ENDPOINT"));
        endpoints
            .fold(self.address.trim_end_matches('/').to_owned(), |text, (_, endpoint)| format!("{text} at {endpoint}"))
    }

    /// The environment that another process needs for the same object store. It has secrets.
    pub fn environment(&self) -> impl Iterator<Item = (&str, &str)> {
        self.environment.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The client, and where in it everything is. Nothing is asked of the store; a folder is made.
    pub(crate) fn open(&self) -> Result<(Arc<dyn ObjectStore>, Path), Error> {
        let failed =
            |source: Box<dyn std::error::Error + Send + Sync>| Error::Open { address: self.address.clone(), source };
        match &self.place {
            Place::Folder(path) => {
                std::fs::create_dir_all(path).map_err(|error| failed(error.into()))?;
                let folder = LocalFileSystem::new_with_prefix(path).map_err(|error| failed(error.into()))?;
                // What is uploaded may be all that is left of a capsule.
                Ok((Arc::new(folder.with_fsync(true)), Path::default()))
            }
            Place::Bucket { bucket, prefix } => {
                let builder = AmazonS3Builder::new().with_bucket_name(bucket).with_retry(RetryConfig {
                    backoff: BackoffConfig { max_backoff: RETRY_FOR, ..BackoffConfig::default() },
                    max_retries: RETRIES,
                    retry_timeout: RETRY_FOR,
                });
                let client = ClientOptions::new().with_timeout(REQUEST).with_connect_timeout(CONNECT);
                let mut builder = builder.with_client_options(client);
                for (name, value) in &self.environment {
                    // What it does not know, other programs do.
                    if let Ok(key) = name.to_ascii_lowercase().parse() {
                        builder = builder.with_config(key, value);
                    }
                    // Whoever gives an address without TLS means it.
                    if name.starts_with("AWS_ENDPOINT") && value.starts_with("http://") {
                        builder = builder.with_allow_http(true);
                    }
                }
                let bucket = builder.build().map_err(|error| failed(error.into()))?;
                let prefix = Path::parse(prefix).map_err(|error| failed(error.into()))?;
                Ok((Arc::new(bucket), prefix))
            }
        }
    }
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.environment.keys().collect();
        f.debug_struct("Config").field("address", &self.address).field("environment", &names).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(address: &str) -> Result<Config, Error> {
        let environment = [("AWS_SECRET_ACCESS_KEY", "hush"), ("HOME", "/root")];
        Config::parse(address, environment.map(|(name, value)| (name.to_owned(), value.to_owned())))
    }

    #[test]
    fn folders_and_buckets_are_understood_and_nothing_else() {
        for address in ["file:///var/lib/wrenn", "s3://bucket", "s3://bucket/", "s3://bucket/some/prefix/"] {
            assert_eq!(parse(address).unwrap().address(), address);
        }
        for address in ["", "/var/lib", "file://relative", "s3://", "s3:///prefix", "s3://b/a//b", "https://host/x"] {
            assert!(matches!(parse(address), Err(Error::Address(_))), "{address}");
        }
    }

    #[test]
    fn stores_are_told_apart() {
        let identity = |address: &str, environment: &[(&str, &str)]| {
            let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
            Config::parse(address, environment).unwrap().identity()
        };
        let (endpoint, secret) = (("AWS_ENDPOINT_URL", "http://one"), ("AWS_SECRET_ACCESS_KEY", "hush"));
        assert_eq!(identity("s3://bucket/", &[secret]), "s3://bucket");
        assert_eq!(identity("s3://bucket", &[endpoint, secret]), "s3://bucket at http://one");
        assert_eq!(identity("file:///x", &[endpoint]), "file:///x");
    }

    #[test]
    fn secrets_go_to_who_needs_them_and_are_not_shown() {
        let config = parse("s3://bucket").unwrap();
        assert_eq!(config.environment().collect::<Vec<_>>(), [("AWS_SECRET_ACCESS_KEY", "hush")]);
        assert!(!format!("{config:?}").contains("hush"));
        assert_eq!(parse("file:///x").unwrap().environment().count(), 0);
    }
}
