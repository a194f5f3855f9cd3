use tokio_rustls::rustls::RootCertStore;
use tokio_rustls::rustls::client::WebPkiServerVerifier;
use tokio_rustls::rustls::client::danger::ServerCertVerifier;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName, UnixTime};

use super::*;

fn names(domain: &str) -> Names {
    Names { domain: domain.to_owned(), addresses: vec!["192.0.2.7".parse().unwrap()] }
}

/// Whether a client that trusts the authority and asked for `name` takes what it is shown for `name` at that time.
fn is_trusted(authority: &Authority, name: &str, now: SystemTime) -> bool {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.certificate().as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = WebPkiServerVerifier::builder_with_provider(roots.into(), provider).build().unwrap();
    let name: ServerName<'_> = name.to_owned().try_into().unwrap();
    let asked = match &name {
        ServerName::DnsName(name) => Some(name.as_ref()),
        _ => None,
    };
    let shown = authority.certified(asked, now).unwrap();
    let time = UnixTime::since_unix_epoch(now.duration_since(UNIX_EPOCH).unwrap());
    verifier.verify_server_cert(&shown.cert[0], &[], &name, &[], time).is_ok()
}

#[test]
fn it_vouches_for_the_domain_and_this_machine_only() {
    let dir = tempfile::tempdir().unwrap();
    for domain in ["localhost", "caps.example.net"] {
        let authority = Authority::open(dir.path(), names(domain)).unwrap();
        let now = SystemTime::now();
        let capsule = format!("8000-cl-0000000000000000000000001.{domain}");
        for name in [domain, "localhost", "127.0.0.1", "::1", "192.0.2.7", &capsule, &capsule.to_uppercase()] {
            assert!(is_trusted(&authority, name, now), "{name}");
        }
        let deep = format!("a.{capsule}");
        for name in ["example.com", "127.0.0.2", "192.0.2.8", "xlocalhost", &deep] {
            assert!(!is_trusted(&authority, name, now), "{name}");
        }
        // Not even if it wanted to.
        let leaf = authority.vouch("elsewhere.example", now).unwrap();
        authority.made.lock().unwrap().insert(String::new(), (now, Arc::new(leaf)));
        assert!(!is_trusted(&authority, "elsewhere.example", now));
    }
}

#[test]
fn what_it_shows_is_never_about_to_expire() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::open(dir.path(), names("localhost")).unwrap();
    let mut shown = Vec::new();
    for day in 0..400 {
        let now = SystemTime::now() + DAY * day;
        assert!(is_trusted(&authority, "localhost", now), "on day {day}");
        let certified = authority.certified(None, now).unwrap();
        if shown.last().is_none_or(|last| !Arc::ptr_eq(last, &certified)) {
            shown.push(certified);
        }
    }
    assert_eq!(shown.len(), 400_usize.div_ceil(15));
}

#[test]
fn it_is_made_once_and_kept_to_its_user() {
    let dir = tempfile::tempdir().unwrap();
    let first = Authority::open(dir.path(), names("localhost")).unwrap();
    let tls = dir.path().join("tls");
    let kept = fs::read(tls.join("authority.json")).unwrap();
    let second = Authority::open(dir.path(), names("localhost")).unwrap();
    assert_eq!(first.certificate(), second.certificate());
    assert_eq!(fs::read_to_string(certificate_path(dir.path())).unwrap(), second.certificate());
    assert_eq!(fs::read(tls.join("authority.json")).unwrap(), kept);
    assert!(is_trusted(&second, "localhost", SystemTime::now()));
    for entry in fs::read_dir(&tls).unwrap() {
        assert_eq!(entry.unwrap().metadata().unwrap().permissions().mode() & 0o777, 0o600);
    }
    // For another domain, when little is left of it, and when it cannot be read, there is another.
    let third = Authority::open(dir.path(), names("caps.example.net")).unwrap();
    assert_ne!(third.certificate(), second.certificate());
    let mut old: Kept = serde_json::from_slice(&fs::read(tls.join("authority.json")).unwrap()).unwrap();
    old.until = seconds(SystemTime::now() + AUTHORITY_LEAST - DAY);
    fs::write(tls.join("authority.json"), serde_json::to_vec(&old).unwrap()).unwrap();
    let fourth = Authority::open(dir.path(), names("caps.example.net")).unwrap();
    assert_ne!(fourth.certificate(), third.certificate());
    fs::write(tls.join("authority.json"), "{").unwrap();
    let fifth = Authority::open(dir.path(), names("caps.example.net")).unwrap();
    assert_ne!(fifth.certificate(), fourth.certificate());
}

#[test]
fn many_names_are_not_many_certificates_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::open(dir.path(), names("localhost")).unwrap();
    for number in 0..KEPT + 10 {
        authority.certified(Some(&format!("{number}.localhost")), SystemTime::now()).unwrap();
    }
    assert!(authority.made.lock().unwrap().len() <= KEPT);
}
