use proptest::prelude::*;
use rustls::server::Acceptor;

use super::*;

/// A vector with its length in `width` bytes before it.
fn vector(width: usize, content: &[u8]) -> Vec<u8> {
    [&content.len().to_be_bytes()[8 - width..], content].concat()
}

fn extension(kind: u16, content: &[u8]) -> Vec<u8> {
    [&kind.to_be_bytes()[..], &vector(2, content)].concat()
}

fn server_name(name: &[u8]) -> Vec<u8> {
    extension(0, &vector(2, &[&[0][..], &vector(2, name)].concat()))
}

/// What every real hello has besides.
fn usual() -> Vec<u8> {
    [
        extension(10, &vector(2, &[0, 29])),
        extension(13, &vector(2, &[4, 3])),
        extension(43, &vector(1, &[3, 4])),
        extension(51, &vector(2, &[&[0, 29][..], &vector(2, &[7; 32])].concat())),
    ]
    .concat()
}

/// A hello with these extensions, without records.
fn hello(extensions: &[u8]) -> Vec<u8> {
    let random = [0x5a; 32];
    let fields = [
        &[3, 3][..],
        &random,
        &vector(1, &[1; 32]),
        &vector(2, &[0x13, 0x01]),
        &vector(1, &[0]),
        &vector(2, extensions),
    ];
    [&[1][..], &vector(3, &fields.concat())].concat()
}

/// The same in records of at most `size` bytes.
fn records(message: &[u8], size: usize) -> Vec<u8> {
    message.chunks(size).flat_map(|part| [&[22, 3, 1][..], &vector(2, part)].concat()).collect()
}

fn tls(extensions: &[u8]) -> Vec<u8> {
    records(&hello(extensions), 1 << 14)
}

/// What a server makes of it.
fn as_servers_read(mut bytes: &[u8]) -> Option<String> {
    let mut acceptor = Acceptor::default();
    while !bytes.is_empty() {
        if acceptor.read_tls(&mut bytes).is_err() {
            return None;
        }
        match acceptor.accept() {
            Ok(Some(accepted)) => return accepted.client_hello().server_name().map(str::to_owned),
            Ok(None) => {}
            Err(_) => return None,
        }
    }
    None
}

#[test]
fn a_hello_names_its_server_however_it_is_cut() {
    let message = hello(&[server_name(b"API.Example.com"), usual()].concat());
    for size in [1, 2, 5, 50, 1 << 14] {
        let bytes = records(&message, size);
        assert_eq!(name(&bytes), Ok(Some("api.example.com".into())), "in records of {size}");
        assert_eq!(as_servers_read(&bytes).as_deref(), Some("api.example.com"));
        for end in 0..bytes.len() {
            assert_eq!(name(&bytes[..end]), Ok(None), "{end} bytes of it");
        }
        // What follows is not looked at.
        assert_eq!(name(&[&bytes[..], &[23, 3, 3, 0, 1, 9]].concat()), Ok(Some("api.example.com".into())));
    }
}

#[test]
fn what_is_not_sure_about_its_server_is_refused() {
    let good = server_name(b"a.example");
    let two_names =
        extension(0, &vector(2, &[&[0][..], &vector(2, b"a.example"), &[0], &vector(2, b"b.example")].concat()));
    let longer = extension(0, &[&vector(2, &[&[0][..], &vector(2, b"a.example")].concat())[..], b"more"].concat());
    for (what, bytes, refused) in [
        ("no name", tls(&usual()), Refused::NoName),
        ("no extensions", tls(&[]), Refused::NoName),
        ("an encrypted hello", tls(&[good.clone(), extension(0xfe0d, &[0; 40])].concat()), Refused::Encrypted),
        ("an encrypted name", tls(&extension(0xffce, &[0; 40])), Refused::Encrypted),
        (
            "two extensions",
            tls(&[good.clone(), server_name(b"b.example")].concat()),
            Refused::Malformed("two server names"),
        ),
        ("two names", tls(&two_names), Refused::Malformed("its server name")),
        ("a longer list", tls(&longer), Refused::Malformed("its server name")),
        ("an address", tls(&server_name(b"192.0.2.1")), Refused::BadName),
        ("a NUL", tls(&server_name(b"a.example\0.evil.example")), Refused::BadName),
        ("no text", tls(&server_name(b"\xff\xfe")), Refused::BadName),
        ("an empty name", tls(&server_name(b"")), Refused::BadName),
        ("a long name", tls(&server_name(&[b'a'; 300])), Refused::BadName),
        ("another message", records(&[2, 0, 0, 1, 0], 9), Refused::Malformed("it does not begin with a hello")),
        ("an empty record", vec![22, 3, 1, 0, 0], Refused::Malformed("a record")),
        ("an alert", vec![22, 3, 1, 0, 1, 1, 21, 3, 1, 0, 2, 1, 0], Refused::Malformed("a record")),
        ("SSL 2", vec![22, 2, 0, 0, 1, 1], Refused::Malformed("a record")),
        ("a long hello", vec![22, 3, 1, 0, 4, 1, 1, 0, 0], Refused::TooLong),
        ("a long record", vec![22, 3, 1, 0x40, 1], Refused::Malformed("a record")),
        ("a torn extension", tls(&[&good[..], &[0, 9, 0, 9]].concat()), Refused::Malformed("an extension")),
        (
            "two messages",
            records(&[hello(&good), hello(&server_name(b"b.example"))].concat(), 1 << 14),
            Refused::Malformed("something follows the hello in its record"),
        ),
        ("another protocol", b"\x00\x00\x00\x01".to_vec(), Refused::Unknown),
        ("SSH", b"ssh-2.0-x\r\n".to_vec(), Refused::Unknown),
    ] {
        assert_eq!(name(&bytes), Err(refused), "{what}");
    }
    let endless: Vec<u8> = records(&[&[1, 0, 0x3f, 0][..], &[0; LIMIT]].concat(), 1);
    assert_eq!(name(&endless[..LIMIT]), Err(Refused::TooLong));
}

#[test]
fn a_request_names_its_host() {
    for (request, host) in [
        ("GET / HTTP/1.1\r\nHost: Example.com\r\n\r\n", "example.com"),
        (
            "GET /a?b=http://evil.example HTTP/1.0\r\nAccept: */*\r\nhOST:\t example.com:8080 \r\n\r\nbody",
            "example.com",
        ),
        ("OPTIONS * HTTP/1.1\r\nHost: a.example.\r\n\r\n", "a.example"),
        // What follows the head is a body, whatever it says.
        ("POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 22\r\n\r\nHost: b.example\n\r\n\r\n", "a.example"),
    ] {
        assert_eq!(name(request.as_bytes()), Ok(Some(host.into())), "{request:?}");
        let head = request.find("\r\n\r\n").unwrap() + 4;
        for end in 0..head {
            assert_eq!(name(&request.as_bytes()[..end]), Ok(None), "{:?}", &request[..end]);
        }
    }
}

#[test]
fn what_is_not_sure_about_its_host_is_refused() {
    use Refused::{BadName, Malformed, NoName, Unknown};
    let line = "its request line has a host";
    for (request, refused) in [
        ("GET / HTTP/1.1\r\nHost: a.example\r\nhost: b.example\r\n\r\n", Malformed("two Host fields")),
        ("GET / HTTP/1.1\r\nHost: a.example\r\nHost: a.example\r\n\r\n", Malformed("two Host fields")),
        ("GET http://b.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n", Malformed(line)),
        ("CONNECT b.example:443 HTTP/1.1\r\nHost: a.example\r\n\r\n", Malformed(line)),
        ("GET b.example HTTP/1.1\r\nHost: a.example\r\n\r\n", Malformed(line)),
        ("GET / HTTP/1.1\r\nAccept: */*\r\n\r\n", NoName),
        ("GET / HTTP/1.1\r\nHost:\r\n\r\n", BadName),
        ("GET / HTTP/1.1\r\nHost: a.example, b.example\r\n\r\n", BadName),
        ("GET / HTTP/1.1\r\nHost: a.example@b.example\r\n\r\n", BadName),
        ("GET / HTTP/1.1\r\nHost: a.example:80:b\r\n\r\n", BadName),
        ("GET / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", BadName),
        ("GET / HTTP/1.1\r\nHost: 192.0.2.1\r\n\r\n", BadName),
        ("GET / HTTP/1.1\r\nHost: 3221225985\r\n\r\n", BadName),
        ("GET / HTTP/1.1\nHost: a.example\r\n\r\n", Malformed("a line does not end in CR LF")),
        (
            "GET / HTTP/1.1\r\nX: y\nHost: b.example\r\nHost: a.example\r\n\r\n",
            Malformed("a line does not end in CR LF"),
        ),
        ("GET / HTTP/1.1\r\nHost : a.example\r\n\r\n", Malformed("a request")),
        ("GET / HTTP/1.1\r\n Host: a.example\r\n\r\n", Malformed("a request")),
        ("GET / HTTP/1.1\r\nX: y\r\n Host: b.example\r\nHost: a.example\r\n\r\n", Malformed("a request")),
        ("GET / HTTP/1.1\r\nX: \0\r\nHost: a.example\r\n\r\n", Malformed("a request")),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Unknown),
        ("HELO example.com\r\n", Malformed("a request")),
    ] {
        match (name(request.as_bytes()), refused) {
            // Which of the two it is called is the parser's business.
            (Err(Malformed("a request") | Unknown), Malformed("a request") | Unknown) => {}
            (found, refused) => assert_eq!(found, Err(refused), "{request:?}"),
        }
    }
    let many = format!("GET / HTTP/1.1\r\n{}Host: a.example\r\n\r\n", "X: y\r\n".repeat(100));
    assert_eq!(name(many.as_bytes()), Err(Refused::TooLong));
    let endless = format!("GET / HTTP/1.1\r\nX: {}", "y".repeat(LIMIT));
    assert_eq!(name(&endless.as_bytes()[..LIMIT]), Err(Refused::TooLong));
}

proptest! {
    #[test]
    fn a_server_reads_no_other_name(
        host in "[a-zA-Z0-9.\\-_]{1,40}", size in 1usize..200, flip: Option<(prop::sample::Index, u8)>,
    ) {
        let mut bytes = records(&hello(&[usual(), server_name(host.as_bytes()), extension(21, &[0; 9])].concat()), size);
        if let Some((at, to)) = flip {
            let at = at.index(bytes.len());
            bytes[at] = to;
        }
        if let (Ok(Some(ours)), Some(theirs)) = (name(&bytes), as_servers_read(&bytes)) {
            prop_assert_eq!(ours, theirs.trim_end_matches('.').to_ascii_lowercase());
        }
    }

    #[test]
    fn more_bytes_change_no_verdict(bytes: Vec<u8>, start in prop::sample::select(vec!["", "GET / HTTP/1.1\r\n", "\x16\x03\x01"])) {
        let bytes = [start.as_bytes(), &bytes].concat();
        let mut verdict = Ok(None);
        for end in 0..=bytes.len() {
            let next = name(&bytes[..end]);
            if matches!(verdict, Ok(Some(_))) {
                prop_assert_eq!(&next, &verdict);
            }
            verdict = next;
        }
    }
}
