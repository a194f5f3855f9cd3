use proptest::prelude::*;

use super::*;

fn policy(json: &str) -> Result<Policy, Invalid> {
    serde_json::from_str::<SetEgress>(json).unwrap().validate("network.")
}

fn shown(json: &str) -> (Vec<String>, Vec<String>) {
    let Egress { allow_out, deny_out } = Egress::from(&policy(json).unwrap());
    (allow_out, deny_out)
}

#[test]
fn nothing_means_everything() {
    for json in ["{}", r#"{"allow_internet_access":true}"#, r#"{"allow_out":[],"deny_out":null,"rules":{}}"#] {
        assert!(policy(json).unwrap().is_open(), "{json}");
    }
}

#[test]
fn both_spellings_and_one_canonical_form() {
    let off = (vec![], vec!["0.0.0.0/0".to_owned()]);
    assert_eq!(shown(r#"{"allow_internet_access":false}"#), off);
    assert_eq!(shown(r#"{"allowInternetAccess":false,"denyOut":["0.0.0.0/0"]}"#), off);
    let (allow, deny) = shown(
        r#"{"allowOut":["8.8.8.8","9.9.9.77/24","*.Example.COM","bücher.example.","a_b.example"],"deny_out":["0.0.0.0/0"]}"#,
    );
    assert_eq!(allow, ["8.8.8.8/32", "9.9.9.0/24", "a_b.example", "*.example.com", "xn--bcher-kva.example"]);
    assert_eq!(deny, ["0.0.0.0/0"]);
}

#[test]
fn bounds_are_named() {
    for (json, field) in [
        (r#"{"allow_out":["1.2.3.4","::1"]}"#, "network.allow_out[1]"),
        (r#"{"allow_out":["2001:db8::/32"]}"#, "network.allow_out[0]"),
        (r#"{"deny_out":["1.2.3.4/33"]}"#, "network.deny_out[0]"),
        (r#"{"deny_out":["1.2.3.4/+8"]}"#, "network.deny_out[0]"),
        (r#"{"deny_out":["1.2.3.4/"]}"#, "network.deny_out[0]"),
        (r#"{"deny_out":["01.2.3.4"]}"#, "network.deny_out[0]"),
        (r#"{"deny_out":["1.2.3"]}"#, "network.deny_out[0]"),
        (r#"{"deny_out":["example.com"]}"#, "network.deny_out[0]"),
        (r#"{"allow_out":["example.com"]}"#, "network.allow_out"),
        (r#"{"allow_out":["example.com"],"deny_out":["0.0.0.0/1"]}"#, "network.allow_out"),
    ] {
        assert_eq!(policy(json).unwrap_err().field, field, "{json}");
    }
    let off = |name: &str| SetEgress {
        allow_internet_access: Some(false),
        allow_out: Some(vec![name.to_owned()]),
        ..Default::default()
    };
    let long = format!("{}.example", ["x".repeat(63).as_str(); 4].join("."));
    for bad in [
        "",
        "*",
        "*.",
        "*.*.example",
        "a.*.example",
        "localhost",
        "exam\0ple.com",
        "example.com\0.evil.example",
        "ex ample.com",
        "example..com",
        ".example.com",
        "example.com:443",
        "http://example.com",
        "exa%6dple.com",
        "example.com\n",
        "evil.1",
        "\u{202e}example.com",
        &long,
        &"ü".repeat(2000),
    ] {
        assert!(off(bad).validate("").is_err(), "{bad:?}");
    }
    assert_eq!(off("x").validate("").unwrap_err().field, "allow_out[0]");
    let many = SetEgress { deny_out: Some(vec!["1.2.3.4".into(); 257]), ..Default::default() };
    assert_eq!(many.validate("").unwrap_err().to_string(), "deny_out must have at most 256 entries");
}

#[test]
fn a_star_means_what_is_below() {
    let star: Domain = "*.example.com".parse().unwrap();
    let plain: Domain = "example.com".parse().unwrap();
    for (name, below, exact) in [
        ("example.com", false, true),
        ("a.example.com", true, false),
        ("b.a.example.com", true, false),
        ("evilexample.com", false, false),
        (".example.com", false, false),
        ("example.com.evil", false, false),
    ] {
        assert_eq!((star.matches(name), plain.matches(name)), (below, exact), "{name}");
    }
    assert_eq!(name("A.Example.com."), Some("a.example.com".into()));
    for bad in ["", ".", "a..b", "a b", "a\0b", "ä.example", "a/b", "[::1]", &"a.".repeat(200)] {
        assert_eq!(name(bad), None, "{bad:?}");
    }
}

proptest! {
    #[test]
    fn what_is_shown_is_what_is_meant(addresses: Vec<(u32, u8)>) {
        let cidrs = addresses.iter().filter_map(|(bits, prefix)| Cidr::new(Ipv4Addr::from_bits(*bits), prefix % 40));
        let allow_out: Vec<String> = cidrs.map(|cidr| cidr.to_string()).take(EGRESS_ENTRIES).collect();
        let asked = SetEgress { allow_internet_access: Some(false), allow_out: Some(allow_out), deny_out: None };
        let policy = asked.validate("").unwrap();
        prop_assert_eq!(SetEgress::from(Egress::from(&policy)).validate("").unwrap(), policy.clone());
        let stored = serde_json::to_string(&policy).unwrap();
        prop_assert_eq!(serde_json::from_str::<Policy>(&stored).unwrap(), policy);
    }

    #[test]
    fn a_network_has_its_address_and_ends_where_the_next_begins(bits: u32, prefix in 0u8..=32) {
        let cidr = Cidr::new(Ipv4Addr::from_bits(bits), prefix).unwrap();
        let (first, last) = cidr.range();
        prop_assert!(first.to_bits() <= bits && bits <= last.to_bits());
        prop_assert_eq!(u64::from(last.to_bits() - first.to_bits()) + 1, 1u64 << (32 - prefix));
        prop_assert_eq!(cidr.to_string().parse::<Cidr>(), Ok(cidr));
    }

    #[test]
    fn any_text_is_an_entry_or_none(text: String) {
        if let Ok(domain) = text.parse::<Domain>() {
            prop_assert_eq!(domain.to_string().parse::<Domain>(), Ok(domain));
        }
    }
}
