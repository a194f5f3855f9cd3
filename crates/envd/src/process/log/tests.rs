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
    assert!((WINDOW - 10 * HEADER..=log.kept()).contains(&(bytes.len() as u64)), "{}", bytes.len());
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

/// A log whose backlog may go to a directory that does not exist: a disk that takes nothing.
fn log_without_disk() -> Arc<TestLog> {
    Arc::new(Log::spilling_to(vec!["/nonexistent".into()]))
}

/// Bytes that differ from place to place, in pieces from two sources.
fn piece(number: u32) -> (Source, Vec<u8>) {
    let source = if number.is_multiple_of(3) { Source::Stderr } else { Source::Stdout };
    (source, number.to_le_bytes().repeat(1 + (number as usize * 7919) % 8000))
}

async fn write(log: &Arc<TestLog>, number: u32) -> usize {
    let (source, data) = piece(number);
    log.room().await;
    log.append(source, &data);
    data.len()
}

/// Follows a log to its end; what each source said.
async fn follow(mut reader: Reader<&'static str>) -> [Vec<u8>; 2] {
    let mut said = [Vec::new(), Vec::new()];
    loop {
        match reader.next().await.unwrap() {
            Item::Data(source, data) => said[usize::from(source == Source::Stderr)].extend(data),
            Item::End(_) => return said,
        }
    }
}

fn expected(pieces: u32) -> [Vec<u8>; 2] {
    let mut all = [Vec::new(), Vec::new()];
    for (source, data) in (0..pieces).map(piece) {
        all[usize::from(source == Source::Stderr)].extend(data);
    }
    all
}

#[tokio::test]
async fn a_reader_left_far_behind_loses_nothing_and_memory_is_bounded() {
    const PIECES: u32 = 3000;
    let log = log();
    let (mut slow, fast) = (log.subscribe(), log.subscribe());
    let fast = tokio::spawn(follow(fast));
    write(&log, 0).await;
    // In the middle of a run that grows and goes to disk later.
    let Item::Data(_, begun) = slow.next().await.unwrap() else { panic!("output comes first") };
    for number in 1..PIECES {
        write(&log, number).await;
        assert!(log.kept() <= MEMORY + 2 * ITEM_BYTES as u64, "{}", log.kept());
    }
    log.finish("done");
    assert!(fast.await.unwrap() == expected(PIECES));
    assert!(log.spilled() > 8 * MEMORY, "{}", log.spilled());
    let [out, err] = expected(PIECES);
    let mut rest = follow(slow).await;
    rest[1].splice(0..0, begun);
    assert!(rest[1] == err && rest[0] == out);
    assert_eq!(log.spilled(), 0);
    assert!(log.kept() < 2 * WINDOW);
}

#[tokio::test]
async fn disk_is_given_back_as_it_is_read_and_when_the_reader_leaves() {
    let log = log();
    let (mut slow, mut fast) = (log.subscribe(), log.subscribe());
    for _ in 0..16 * MEMORY / ITEM_BYTES as u64 {
        log.room().await;
        log.append(Source::Stdout, &[1; ITEM_BYTES]);
        while matches!(ready(fast.next()), Some(Ok(Item::Data(..)))) {}
    }
    let most = log.spilled();
    let spill = Arc::clone(&log.lock().disk.as_ref().unwrap().spill);
    assert!(spill.allocated() >= most, "{} of {most}", spill.allocated());
    for _ in 0..8 * MEMORY / ITEM_BYTES as u64 {
        slow.next().await.unwrap();
    }
    assert!(log.spilled() <= most - 8 * MEMORY + 2 * BATCH);
    while spill.allocated() > most - 8 * MEMORY + 3 * BATCH {
        tokio::task::yield_now().await;
    }
    drop(slow);
    assert_eq!(log.spilled(), 0);
    assert!(log.kept() < 2 * WINDOW);
    while Arc::strong_count(&spill) > 1 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn without_disk_the_process_waits_for_the_slowest() {
    let log = log_without_disk();
    let (slow, fast) = (log.subscribe(), log.subscribe());
    let fast = tokio::spawn(follow(fast));
    let writer = tokio::spawn({
        let log = Arc::clone(&log);
        async move {
            for number in 0..1000 {
                write(&log, number).await;
            }
            log.finish("done");
        }
    });
    while log.lock().full.is_none() {
        tokio::task::yield_now().await;
    }
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
    assert!(!writer.is_finished() && log.kept() <= MEMORY + 2 * ITEM_BYTES as u64);
    assert!(follow(slow).await == expected(1000));
    writer.await.unwrap();
    assert!(fast.await.unwrap() == expected(1000));
}

#[tokio::test]
async fn without_disk_a_slow_reader_that_leaves_lets_the_process_go_on() {
    let log = log_without_disk();
    let (slow, fast) = (log.subscribe(), log.subscribe());
    let fast = tokio::spawn(follow(fast));
    let writer = tokio::spawn({
        let log = Arc::clone(&log);
        async move {
            for number in 0..1000 {
                write(&log, number).await;
            }
            log.finish("done");
        }
    });
    while log.lock().full.is_none() {
        tokio::task::yield_now().await;
    }
    drop(slow);
    writer.await.unwrap();
    assert!(fast.await.unwrap() == expected(1000));
}

#[tokio::test]
async fn many_tiny_runs_are_bounded_too() {
    let log = log();
    let (slow, fast) = (log.subscribe(), log.subscribe());
    let fast = tokio::spawn(follow(fast));
    for number in 0..400_000 {
        log.room().await;
        log.append(if number & 1 == 0 { Source::Stdout } else { Source::Stderr }, b".");
    }
    assert!(log.spilled() > MEMORY);
    assert!(log.lock().chunks.len() < 150_000);
    log.finish("done");
    for reader in [fast.await.unwrap(), follow(slow).await] {
        assert_eq!(reader.map(|said| said.len()), [200_000; 2]);
    }
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
