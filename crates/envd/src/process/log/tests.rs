use super::*;

type TestLog = Log<&'static str>;

fn log() -> Arc<TestLog> {
    Arc::new(Log::default())
}

fn ready<T>(future: impl Future<Output = T>) -> Option<T> {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match std::pin::pin!(future).poll(&mut context) {
        std::task::Poll::Ready(value) => Some(value),
        std::task::Poll::Pending => None,
    }
}

/// Everything a reader can get without waiting.
fn drain(reader: &mut Reader<&'static str>) -> (Vec<u8>, Option<&'static str>) {
    let mut bytes = Vec::new();
    while let Some(item) = ready(reader.next()) {
        match item.expect("the reader keeps up") {
            Item::Data(_, data) => bytes.extend(data),
            Item::End(outcome) => return (bytes, Some(outcome)),
        }
    }
    (bytes, None)
}

#[test]
fn sources_keep_their_order_and_are_not_mixed() {
    let log = log();
    let mut reader = log.subscribe();
    log.append(Source::Stdout, b"a");
    log.append(Source::Stdout, b"b");
    log.append(Source::Stderr, b"x");
    log.append(Source::Stdout, b"c");
    log.finish("done");
    let mut items = Vec::new();
    for _ in 0..4 {
        items.push(ready(reader.next()).unwrap().unwrap());
    }
    let expected = [
        Item::Data(Source::Stdout, b"ab".to_vec()),
        Item::Data(Source::Stderr, b"x".to_vec()),
        Item::Data(Source::Stdout, b"c".to_vec()),
        Item::End("done"),
    ];
    assert_eq!(items, expected);
}

#[test]
fn a_reader_in_the_middle_of_a_chunk_gets_the_rest() {
    let log = log();
    let mut reader = log.subscribe();
    for piece in [b"one ".as_slice(), b"two ", b"three"] {
        log.append(Source::Stdout, piece);
        assert_eq!(drain(&mut reader).0, piece);
    }
    assert_eq!(drain(&mut log.subscribe()).0, b"one two three");
}

#[test]
fn items_have_a_ceiling() {
    let log = log();
    let mut reader = log.subscribe();
    for _ in 0..100 {
        log.append(Source::Terminal, &[7; 1000]);
    }
    while let Some(item) = ready(reader.next()) {
        assert!(matches!(item, Ok(Item::Data(Source::Terminal, data)) if data.len() <= TERMINAL_ITEM_BYTES));
    }
}

#[test]
fn the_writer_waits_for_the_fastest_reader_only() {
    let log = log();
    assert!(ready(log.room()).is_some());
    let (slow, mut fast) = (log.subscribe(), log.subscribe());
    let mut written = 0;
    while ready(log.room()).is_some() {
        log.append(Source::Stdout, &[0; 32 * 1024]);
        written += 32 * 1024;
    }
    assert_eq!(written, WINDOW);
    drain(&mut fast);
    assert!(ready(log.room()).is_some());
    drop(fast);
    assert!(ready(log.room()).is_none(), "the one left is slow");
    drop(slow);
    assert!(ready(log.room()).is_some(), "nobody is left to wait for");
}

#[test]
fn without_readers_only_the_window_is_kept() {
    let log = log();
    for number in 0..1000u32 {
        log.append(Source::Stdout, &number.to_le_bytes().repeat(1024));
    }
    assert!((WINDOW..WINDOW + 2 * ITEM_BYTES as u64).contains(&log.kept()), "{}", log.kept());
    let (bytes, end) = drain(&mut log.subscribe());
    assert_eq!(bytes.len() as u64, log.kept());
    assert_eq!(bytes[bytes.len() - 4..], 999u32.to_le_bytes());
    assert_eq!(end, None);
}

#[test]
fn small_writes_do_not_cost_a_chunk_each() {
    let log = log();
    for _ in 0..1_000_000 {
        log.append(Source::Stdout, b".");
    }
    assert!(log.lock().chunks.len() < 16);
}

#[test]
fn a_reader_left_far_behind_is_told_and_the_other_loses_nothing() {
    let log = log();
    let (mut slow, mut fast) = (log.subscribe(), log.subscribe());
    log.append(Source::Stdout, b"first");
    let mut seen = drain(&mut fast).0.len() as u64;
    for _ in 0..=MAX_LAG / 32_768 {
        log.append(Source::Stdout, &[1; 32_768]);
        seen += drain(&mut fast).0.len() as u64;
    }
    log.finish("done");
    assert_eq!(seen, 5 + (MAX_LAG / 32_768 + 1) * 32_768);
    assert_eq!(drain(&mut fast).1, Some("done"));
    assert_eq!(ready(slow.next()), Some(Err(Lagged)));
    assert!(log.kept() < 2 * WINDOW);
}

#[test]
fn a_backlog_within_bounds_is_kept_whole() {
    let log = log();
    let (mut slow, mut fast) = (log.subscribe(), log.subscribe());
    let mut sent = Vec::new();
    for number in 0..100u8 {
        sent.extend([number; 32_768]);
        log.append(Source::Stdout, &[number; 32_768]);
        drain(&mut fast);
    }
    log.finish("done");
    let (bytes, end) = drain(&mut slow);
    assert!(bytes == sent && end == Some("done"));
    assert!(log.kept() < 2 * WINDOW);
}

#[test]
fn the_end_can_be_read_again() {
    let log = log();
    log.finish("done");
    let mut reader = log.subscribe();
    assert_eq!(drain(&mut reader), (vec![], Some("done")));
    assert_eq!(drain(&mut reader), (vec![], Some("done")));
}

#[tokio::test]
async fn readers_and_writer_wake_each_other() {
    let log = log();
    let mut reader = log.subscribe();
    let writer = tokio::spawn({
        let log = Arc::clone(&log);
        async move {
            for number in 0..2000u32 {
                log.room().await;
                log.append(Source::Stdout, &number.to_le_bytes().repeat(256));
            }
            log.finish("done");
        }
    });
    let mut bytes = Vec::new();
    while let Item::Data(_, data) = reader.next().await.unwrap() {
        bytes.extend(data);
    }
    writer.await.unwrap();
    let expected: Vec<u8> = (0..2000u32).flat_map(|number| number.to_le_bytes().repeat(256)).collect();
    assert!(bytes == expected);
}
