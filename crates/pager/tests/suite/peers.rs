//! VMMs that are broken or mean: each gets a typed error, and the pager ends without harm.

use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use pager::{Config, Ended, Error, PAGE, handshake};
use rustix::event::{EventfdFlags, eventfd};

use crate::stored::{PAGES, Stored, start};
use crate::vmm::{Kind, Vmm, send};

/// What a peer that sends `messages` ends its pager with. Descriptors go with the first message.
fn refusal(messages: &[&[u8]], fds: &[BorrowedFd<'_>]) -> Error {
    let stored = Stored::new();
    let pager = start(stored.config());
    let stream = UnixStream::connect(stored.socket()).unwrap();
    for (index, message) in messages.iter().enumerate() {
        send(&stream, message, if index == 0 { fds } else { &[] });
    }
    if messages.is_empty() {
        drop(stream);
    }
    pager.end().unwrap_err()
}

#[test]
fn wrong_handshakes_end_the_pager() {
    type Is = fn(&Error) -> bool;
    let vmm = Vmm::new(Kind::Anonymous, PAGES * PAGE).unwrap();
    let good = vmm.handshake();
    let uffd = vmm.uffd();
    let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let file = tempfile::tempfile().unwrap();
    let many = vec![uffd; 40];
    let too_large = good.replace(&(PAGES * PAGE).to_string(), &(PAGES * PAGE * 2).to_string());
    let long = format!("[{}", format!("{},", &good[1..good.len() - 1]).repeat(3000));
    let cases: [(&str, &[u8], &[BorrowedFd<'_>], Is); 9] = [
        ("no JSON", b"GET / HTTP/1.1\r\n\r\n", &[uffd], |e| matches!(e, Error::Handshake(handshake::Error::Json(_)))),
        ("binary", &[0xff; 4096], &[uffd], |e| matches!(e, Error::Handshake(handshake::Error::Json(_)))),
        ("an empty list", b"[]", &[uffd], |e| matches!(e, Error::Handshake(handshake::Error::NoRegions))),
        ("no descriptor", good.as_bytes(), &[], |e| matches!(e, Error::Descriptors(0))),
        ("two descriptors", good.as_bytes(), &[uffd, uffd], |e| matches!(e, Error::Descriptors(2))),
        ("many descriptors", good.as_bytes(), &many, |e| matches!(e, Error::Descriptors(_))),
        ("an eventfd", good.as_bytes(), &[event.as_fd()], |e| matches!(e, Error::Descriptor(_))),
        ("a file", good.as_bytes(), &[file.as_fd()], |e| matches!(e, Error::Descriptor(_))),
        ("too much memory", too_large.as_bytes(), &[uffd], |e| {
            matches!(e, Error::Handshake(handshake::Error::BeyondMemory { .. }))
        }),
    ];
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    for (what, message, fds, is_right) in cases {
        let error = refusal(&[message], fds);
        assert!(is_right(&error), "{what}: {error:?}");
        assert_eq!(error.exit_code(), 12, "{what}");
    }
    let before = descriptors();
    assert!(matches!(refusal(&[good.as_bytes()], &many), Error::Descriptors(_)));
    assert_eq!(descriptors(), before, "descriptors that were sent are left");
    // A list that never ends, in as many messages as it takes.
    let error = refusal(&[long.as_bytes()], &[uffd]);
    assert!(matches!(error, Error::Handshake(handshake::Error::TooLong)), "{error:?}");
    let error = refusal(&[], &[]);
    assert!(matches!(error, Error::HungUp), "{error:?}");
}

#[test]
fn a_handshake_in_pieces_is_one() {
    let stored = Stored::new();
    let vmm = Vmm::new(Kind::Anonymous, PAGES * PAGE).unwrap();
    let pager = start(stored.config());
    let stream = UnixStream::connect(stored.socket()).unwrap();
    let (handshake, uffd) = (vmm.handshake(), [vmm.uffd()]);
    for (index, byte) in handshake.as_bytes().iter().enumerate() {
        send(&stream, &[*byte], if index == 3 { &uffd } else { &[] });
    }
    assert_eq!(vmm.touch(40), stored.page(40)[0]);
    // What it says after that is nothing to anybody.
    send(&stream, &[7; 1000], &[]);
    assert_eq!(vmm.touch(900), stored.page(900)[0]);
    assert_eq!(pager.stop().unwrap(), Ended::Stopped);
}

#[test]
fn silence_is_not_waited_for_long() {
    let stored = Stored::new();
    let short = || Config { patience: Duration::from_secs(1), ..stored.config() };
    assert!(matches!(start(short()).end(), Err(Error::Patience)), "nobody connects");
    assert!(!stored.socket().exists());
    let pager = start(short());
    let stream = UnixStream::connect(stored.socket()).unwrap();
    assert!(matches!(pager.end(), Err(Error::Patience)), "nothing is said");
    let pager = start(short());
    let unfinished = UnixStream::connect(stored.socket()).unwrap();
    send(&unfinished, b"[{", &[]);
    assert!(matches!(pager.end(), Err(Error::Patience)), "not all is said");
    drop(stream);
}

#[test]
fn a_stop_is_heard_at_any_time() {
    let stored = Stored::new();
    assert_eq!(start(stored.config()).stop().unwrap(), Ended::Stopped);
    let pager = start(stored.config());
    let stream = UnixStream::connect(stored.socket()).unwrap();
    assert_eq!(pager.stop().unwrap(), Ended::Stopped);
    drop(stream);
}

#[test]
fn another_user_is_refused() {
    let stored = Stored::new();
    let pager = start(Config { vmm_uid: Some(4711), ..stored.config() });
    let stream = UnixStream::connect(stored.socket()).unwrap();
    assert!(matches!(pager.end(), Err(Error::Stranger(0))));
    drop(stream);
}

#[test]
fn a_fault_outside_of_what_was_named_ends_the_pager() {
    let stored = Stored::new();
    let mut vmm = Vmm::new(Kind::Anonymous, PAGES * PAGE).unwrap();
    let half = vmm.handshake().replace(&(PAGES * PAGE).to_string(), &(PAGES * PAGE / 2).to_string());
    let pager = start(stored.config());
    vmm.connect_with(&stored.socket(), &half);
    assert_eq!(vmm.touch(40), stored.page(40)[0]);
    let vmm = &vmm;
    std::thread::scope(|scope| {
        let waits = scope.spawn(move || vmm.touch(PAGES - 1));
        let error = pager.end().unwrap_err();
        assert!(matches!(error, Error::Outside(_)), "{error:?}");
        vmm.unregister();
        waits.join().unwrap();
    });
}

#[test]
fn addresses_of_nothing_harm_nobody() {
    let stored = Stored::new();
    let vmm = Vmm::new(Kind::Anonymous, PAGES * PAGE).unwrap();
    let elsewhere = format!(r#"[{{"base_host_virt_addr":4096,"size":{},"offset":0,"page_size":4096}}]"#, PAGES * PAGE);
    let set = stored.path("set");
    // A record to fetch, so that something is tried at those addresses.
    let pager = start(Config { record: Some(set.clone()), ..stored.config() });
    let mut other = Vmm::new(Kind::Anonymous, PAGES * PAGE).unwrap();
    other.connect(&stored.socket());
    other.touch(40);
    pager.stop().unwrap();
    let pager = start(Config { prefetch: Some(set), ..stored.config() });
    let stream = UnixStream::connect(stored.socket()).unwrap();
    send(&stream, elsewhere.as_bytes(), &[vmm.uffd()]);
    assert_eq!(pager.stop().unwrap(), Ended::Stopped);
}
