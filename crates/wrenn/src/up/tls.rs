//! TLS for one machine: a certificate authority that is this directory's own, and a certificate for every name that is asked for.
//!
//! The authority is made once and kept, so that whoever trusts it does so for good; it can vouch for nothing but the domain,
//! `localhost` and this machine's own addresses. What it vouches for is made anew by every start, and again long before it
//! expires. There is no wildcard: what OpenSSL is in takes none that has only one name behind the star, as `*.localhost`.

use std::collections::HashMap;
use std::fs::{self, Permissions};
use std::io::Write;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CidrSubnet, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    GeneralSubtree, IsCa, Issuer, KeyPair, KeyUsagePurpose, NameConstraints, SanType,
};
use serde::{Deserialize, Serialize};
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::aws_lc_rs;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;
use tokio_rustls::rustls::server::{ClientHello, ResolvesServerCert};
use tokio_rustls::rustls::sign::{CertifiedKey, SigningKey};

const DAY: Duration = Duration::from_secs(24 * 3600);
/// How long an authority lives, and the rest with which it is replaced.
const AUTHORITY: Duration = Duration::from_secs(3650 * 24 * 3600);
const AUTHORITY_LEAST: Duration = DAY.saturating_mul(60);
/// How long a certificate is good, and the age at which another is made.
const LEAF: Duration = DAY.saturating_mul(30);
const LEAF_AGE: Duration = DAY.saturating_mul(15);
/// Whom Debian and its like trust.
const SYSTEM: &str = "/etc/ssl/certs/ca-certificates.crt";
/// Clocks differ.
const EARLIER: Duration = DAY;
/// Certificates kept at once.
const KEPT: usize = 4096;

/// What the API and capsules are called here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Names {
    /// The domain of capsules, without a port.
    pub domain: String,
    /// Addresses besides those of loopback.
    pub addresses: Vec<IpAddr>,
}

/// What is kept of an authority, in one file so that it is there as a whole or not at all.
#[derive(Serialize, Deserialize)]
struct Kept {
    name: String,
    names: Names,
    /// Seconds since 1970.
    until: u64,
    certificate: String,
    key: String,
}

/// The authority of a directory, and what it has vouched for since the start.
pub struct Authority {
    kept: Kept,
    issuer: Issuer<'static, KeyPair>,
    leaf_key: KeyPair,
    signing: Arc<dyn SigningKey>,
    made: Mutex<HashMap<String, (SystemTime, Arc<CertifiedKey>)>>,
}

/// Where the certificate of a directory's authority is, for those who are to trust it.
pub fn certificate_path(dir: &Path) -> PathBuf {
    dir.join("tls/ca.pem")
}

/// The same beside everyone whom this machine trusts.
pub fn bundle_path(dir: &Path) -> PathBuf {
    dir.join("tls/bundle.pem")
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").field("name", &self.kept.name).finish_non_exhaustive()
    }
}

impl Authority {
    /// That of the directory, made if there is none for these names that is good for a while.
    pub fn open(dir: &Path, names: Names) -> Result<Self> {
        let own = dir.join("tls");
        fs::create_dir_all(&own)?;
        fs::set_permissions(&own, Permissions::from_mode(0o700))?;
        let path = own.join("authority.json");
        let found: Option<Kept> = fs::read(&path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let least = seconds(SystemTime::now() + AUTHORITY_LEAST);
        let kept = match found.filter(|kept| kept.names == names && kept.until > least) {
            Some(kept) => kept,
            None => {
                let kept = make(names).context("making a certificate authority")?;
                write(&path, &serde_json::to_vec(&kept)?)?;
                kept
            }
        };
        write(&certificate_path(dir), kept.certificate.as_bytes())?;
        // Where one file is all that a program trusts, everyone else is in it too.
        let others = fs::read(SYSTEM).unwrap_or_default();
        write(&bundle_path(dir), &[kept.certificate.as_bytes(), &others].concat())?;
        let key = KeyPair::from_pem(&kept.key).with_context(|| format!("reading {}", path.display()))?;
        let issuer = Issuer::new(authority(&kept.name, &kept.names), key);
        let leaf_key = KeyPair::generate()?;
        let der = PrivateKeyDer::try_from(leaf_key.serialize_der()).map_err(anyhow::Error::msg)?;
        let signing = aws_lc_rs::sign::any_ecdsa_type(&der)?;
        Ok(Self { kept, issuer, leaf_key, signing, made: Mutex::default() })
    }

    /// Its certificate, in PEM.
    pub fn certificate(&self) -> &str {
        &self.kept.certificate
    }

    /// How a server speaks TLS with what it vouches for.
    pub fn config(self: Arc<Self>) -> Result<ServerConfig> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
        Ok(config.with_no_client_auth().with_cert_resolver(self))
    }

    /// What is shown to a client that asks for `name`.
    fn certified(&self, name: Option<&str>, now: SystemTime) -> Result<Arc<CertifiedKey>> {
        let name = name.map(str::to_ascii_lowercase).filter(|name| self.is_capsules(name)).unwrap_or_default();
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((since, certified)) = made.get(&name)
            && now.duration_since(*since).is_ok_and(|age| age < LEAF_AGE)
        {
            return Ok(certified.clone());
        }
        if made.len() >= KEPT {
            made.clear();
        }
        let certified = Arc::new(self.vouch(&name, now)?);
        made.insert(name, (now, certified.clone()));
        Ok(certified)
    }

    /// Whether the name is one below the domain.
    fn is_capsules(&self, name: &str) -> bool {
        let label = name.strip_suffix(&self.kept.names.domain).and_then(|label| label.strip_suffix('.'));
        label.is_some_and(|label| !label.is_empty() && !label.contains('.'))
    }

    /// A certificate for that name, or for all that the API is called.
    fn vouch(&self, name: &str, now: SystemTime) -> Result<CertifiedKey> {
        let mut params = match name {
            "" => {
                let mut params = CertificateParams::new(vec![self.kept.names.domain.clone(), "localhost".to_owned()])?;
                params.subject_alt_names.dedup();
                params.subject_alt_names.extend(addresses(&self.kept.names).map(SanType::IpAddress));
                params
            }
            name => CertificateParams::new(vec![name.to_owned()])?,
        };
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "Wrenn");
        valid(&mut params, now, LEAF);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let leaf = params.signed_by(&self.leaf_key, &self.issuer)?;
        Ok(CertifiedKey::new(vec![leaf.der().clone()], self.signing.clone()))
    }
}

impl ResolvesServerCert for Authority {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        // What is in it was made from what we know; that it fails is no client's doing, and costs it its connection.
        self.certified(hello.server_name(), SystemTime::now()).ok()
    }
}

fn make(names: Names) -> Result<Kept> {
    let now = SystemTime::now();
    let mut serial = [0; 4];
    getrandom::fill(&mut serial)?;
    let name = format!("Wrenn on this machine, {:08x}", u32::from_be_bytes(serial));
    let key = KeyPair::generate()?;
    let mut params = authority(&name, &names);
    valid(&mut params, now, AUTHORITY);
    let certificate = params.self_signed(&key)?.pem();
    Ok(Kept { name, names, until: seconds(now + AUTHORITY), certificate, key: key.serialize_pem() })
}

/// All of an authority that its name and its domain tell.
fn authority(name: &str, names: &Names) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let mut permitted = vec![GeneralSubtree::DnsName("localhost".to_owned())];
    if names.domain != "localhost" {
        permitted.push(GeneralSubtree::DnsName(names.domain.clone()));
    }
    let whole = |address: IpAddr| CidrSubnet::from_addr_prefix(address, if address.is_ipv4() { 32 } else { 128 });
    permitted.extend(addresses(names).map(|address| GeneralSubtree::IpAddress(whole(address))));
    params.name_constraints = Some(NameConstraints { permitted_subtrees: permitted, excluded_subtrees: Vec::new() });
    params
}

/// The addresses of this machine that may be asked for.
fn addresses(names: &Names) -> impl Iterator<Item = IpAddr> + '_ {
    let loopback = [IpAddr::from([127, 0, 0, 1]), IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1])];
    let more = names.addresses.iter().copied().filter(move |address| !loopback.contains(address));
    loopback.into_iter().chain(more)
}

fn valid(params: &mut CertificateParams, now: SystemTime, length: Duration) {
    let at = |time: SystemTime| rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(seconds(time));
    params.not_before = at(now - EARLIER);
    params.not_after = at(now + length);
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Replaces a file as a whole, readable by its user only from the first byte.
fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = tempfile::NamedTempFile::new_in(path.parent().context("a file has a directory")?)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path).with_context(|| format!("writing {}", path.display()))?;
    Ok(())
}

#[cfg(test)]
mod tests;
