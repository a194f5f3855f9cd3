//! Watching directories, by stream and by asking.

use crate::entries::{Files, files, files_in, text};
use crate::harness::*;
use connectrpc::client::{CallOptions, ClientTransport, HttpClient, ServerStream};
use connectrpc::{CodecFormat, ConnectError, ErrorCode};
use envd::filesystem::watchers::{MAX_WAITING, MAX_WATCHERS};
use guest_api::filesystem::watch_dir_response::Event;
use guest_api::filesystem::*;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

type Body = <HttpClient as ClientTransport>::ResponseBody;

struct Watch(ServerStream<Body, WatchDirResponseView<'static>>);

impl Watch {
    /// A stream that has begun.
    async fn start(files: &Files, request: WatchDirRequest) -> Result<Watch, ConnectError> {
        Watch::start_with(files, request, CallOptions::default()).await
    }

    async fn start_with(files: &Files, request: WatchDirRequest, options: CallOptions) -> Result<Watch, ConnectError> {
        let mut watch = Watch(files.watch_dir_with_options(request, options).await?);
        match watch.event().await? {
            Event::Start(_) => Ok(watch),
            other => panic!("a stream begins with start, not {other:?}"),
        }
    }

    async fn event(&mut self) -> Result<Event, ConnectError> {
        let message = tokio::time::timeout(PATIENCE, self.0.message()).await.expect("an event");
        let message = message?.expect("a watch does not end by itself");
        Ok(message.to_owned_message().event.expect("an event says which"))
    }

    async fn next(&mut self) -> Result<FilesystemEvent, ConnectError> {
        match self.event().await? {
            Event::Filesystem(event) => Ok(*event),
            other => panic!("no {other:?} is expected"),
        }
    }

    /// Everything until the file `name` comes.
    async fn until(&mut self, name: &str) -> Vec<(EventType, String)> {
        let mut events = Vec::new();
        loop {
            let event = self.next().await.unwrap();
            if event.name == name {
                return events;
            }
            events.push((event.r#type.as_known().unwrap(), event.name));
        }
    }
}

fn request(path: &Path, recursive: bool) -> WatchDirRequest {
    WatchDirRequest { path: text(path), recursive, ..Default::default() }
}

fn create(name: &str) -> (EventType, String) {
    (EventType::EVENT_TYPE_CREATE, name.to_owned())
}

fn chmod(name: &str) -> (EventType, String) {
    (EventType::EVENT_TYPE_CHMOD, name.to_owned())
}

fn write(name: &str) -> (EventType, String) {
    (EventType::EVENT_TYPE_WRITE, name.to_owned())
}

fn renamed(name: &str) -> (EventType, String) {
    (EventType::EVENT_TYPE_RENAME, name.to_owned())
}

fn removed(name: &str) -> (EventType, String) {
    (EventType::EVENT_TYPE_REMOVE, name.to_owned())
}

/// As uploads do it.
fn upload(path: &Path) {
    let mut file = File::create(path).unwrap();
    std::os::unix::fs::fchown(&file, Some(1), Some(1)).unwrap();
    file.write_all(b"content").unwrap();
}

/// How many inotify descriptors envd holds.
fn inotifies(envd: &Envd) -> usize {
    let links = fs::read_dir(format!("/proc/{}/fd", envd.pid())).unwrap();
    let links = links.filter_map(|link| fs::read_link(link.ok()?.path()).ok());
    links.filter(|link| link.to_string_lossy().contains("inotify")).count()
}

#[tokio::test]
async fn an_upload_is_three_events() {
    let envd = Envd::start();
    for codec in [CodecFormat::Proto, CodecFormat::Json] {
        let files = files_in(&envd, codec);
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("a/b")).unwrap();
        let mut flat = Watch::start(&files, request(root.path(), false)).await.unwrap();
        let mut deep = Watch::start(&files, request(root.path(), true)).await.unwrap();
        upload(&root.path().join("file"));
        upload(&root.path().join("a/b/file"));
        File::create(root.path().join("end")).unwrap();
        let three = |name: &str| [create(name), chmod(name), write(name)];
        assert_eq!(flat.until("end").await, three("file"));
        assert_eq!(deep.until("end").await, [three("file"), three("a/b/file")].concat());
    }
}

#[tokio::test]
async fn every_kind_of_event_is_told_once_by_its_relative_name() {
    let envd = Envd::start();
    let files = files(&envd);
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    fs::create_dir(at("dir")).unwrap();
    let mut watch = Watch::start(&files, request(root.path(), true)).await.unwrap();
    fs::set_permissions(at("dir"), std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    File::create(at("dir/one")).unwrap();
    fs::rename(at("dir/one"), at("two")).unwrap();
    fs::remove_file(at("two")).unwrap();
    std::os::unix::fs::symlink("nowhere", at("link")).unwrap();
    fs::remove_dir(at("dir")).unwrap();
    File::create(at("end")).unwrap();
    let expected = [
        chmod("dir"),
        create("dir/one"),
        renamed("dir/one"),
        create("two"),
        removed("two"),
        create("link"),
        removed("dir"),
    ];
    assert_eq!(watch.until("end").await, expected);
}

#[tokio::test]
async fn what_new_directories_hold_is_told_once() {
    let envd = Envd::start();
    let files = files(&envd);
    let root = tempfile::tempdir().unwrap();
    let mut watch = Watch::start(&files, request(root.path(), true)).await.unwrap();
    let mut expected = Vec::new();
    for number in 0..200 {
        let mut path = PathBuf::from(format!("d{number}"));
        for level in ["", "a", "b", "c"] {
            path.push(level);
            fs::create_dir(root.path().join(&path)).unwrap();
            expected.push(create(path.to_str().unwrap().trim_end_matches('/')));
            let file = path.join("file");
            fs::write(root.path().join(&file), "x").unwrap();
            expected.extend([create(file.to_str().unwrap()), write(file.to_str().unwrap())]);
        }
    }
    File::create(root.path().join("end")).unwrap();
    let events = watch.until("end").await;
    // A parent comes before its children, and a file before what is written to it.
    for (at, (kind, name)) in events.iter().enumerate() {
        let before = &events[..at];
        if let Some((parent, _)) = name.rsplit_once('/') {
            assert!(before.contains(&create(parent)), "{parent} before {name}");
        }
        assert!(*kind == EventType::EVENT_TYPE_CREATE || before.contains(&create(name)), "{name}");
    }
    let sorted = |mut events: Vec<(EventType, String)>| {
        events.sort_by_key(|(kind, name)| (name.clone(), *kind as i32));
        // A write at the very moment when its directory is found may be told twice.
        events.dedup_by(|one, other| one.0 == EventType::EVENT_TYPE_WRITE && one == other);
        events
    };
    let (events, expected) = (sorted(events), sorted(expected));
    let first = events.iter().zip(&expected).find(|(one, other)| one != other);
    assert_eq!(first, None);
    assert_eq!(events.len(), expected.len());
}

#[tokio::test]
async fn directories_that_move_are_followed_within_and_left_outside() {
    let envd = Envd::start();
    let files = files(&envd);
    let root = tempfile::tempdir().unwrap();
    let outside = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    fs::create_dir_all(at("old/sub")).unwrap();
    let mut watch = Watch::start(&files, request(root.path(), true)).await.unwrap();
    fs::rename(at("old"), at("new")).unwrap();
    File::create(at("new/sub/file")).unwrap();
    File::create(at("mark1")).unwrap();
    assert_eq!(watch.until("mark1").await, [renamed("old"), create("new"), create("new/sub/file")]);

    fs::rename(at("new"), outside.path().join("away")).unwrap();
    File::create(at("mark2")).unwrap();
    assert_eq!(watch.until("mark2").await, [renamed("new")]);
    File::create(outside.path().join("away/sub/unseen")).unwrap();
    fs::rename(outside.path().join("away"), at("back")).unwrap();
    File::create(at("mark3")).unwrap();
    let back = ["back", "back/sub", "back/sub/file", "back/sub/unseen"].map(create);
    assert_eq!(watch.until("mark3").await, back);
    File::create(at("back/sub/seen")).unwrap();
    File::create(at("mark4")).unwrap();
    assert_eq!(watch.until("mark4").await, [create("back/sub/seen")]);
}

#[tokio::test]
async fn a_clone_is_seen_whole() {
    let envd = Envd::start();
    let files = files(&envd);
    let root = tempfile::tempdir().unwrap();
    let source = root.path().join("source");
    let git = |directory: &Path, arguments: &[&str]| {
        let mut git = Command::new("git");
        git.env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_NOSYSTEM", "1").current_dir(directory);
        git.args(["-c", "user.name=x", "-c", "user.email=x@y", "-c", "init.defaultBranch=main"]).args(arguments);
        let output = git.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    for number in 0..300 {
        let directory = source.join(format!("d{}/e{}/f{number}", number % 10, number % 30));
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join("file"), format!("content {number}")).unwrap();
    }
    git(&source, &["init", "-q"]);
    git(&source, &["add", "."]);
    git(&source, &["commit", "-q", "-m", "all"]);

    let watched = root.path().join("watched");
    fs::create_dir(&watched).unwrap();
    let mut watch = Watch::start(&files, request(&watched, true)).await.unwrap();
    let id = create_watcher(&files, &watched, true).await.unwrap();
    git(&watched, &["clone", "-q", "--no-local", source.to_str().unwrap(), "copy"]);
    File::create(watched.join("end")).unwrap();
    let streamed = watch.until("end").await;
    let mut asked = Vec::new();
    while asked.last() != Some(&create("end")) {
        asked.extend(take(&files, &id).await.unwrap());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }

    let find = Command::new("find").arg(&watched).args(["-mindepth", "1", "-printf", "%P\n"]).output().unwrap();
    let present = String::from_utf8(find.stdout).unwrap();
    for events in [streamed, asked] {
        let mut created: HashMap<&str, usize> = HashMap::new();
        for (kind, name) in &events {
            *created.entry(name).or_default() += usize::from(*kind == EventType::EVENT_TYPE_CREATE);
        }
        let moved = |name: &str| events.iter().any(|(_, other)| *other == format!("{name}.lock"));
        let mut seen = 0;
        for path in present.lines().filter(|path| *path != "end") {
            let times = created.get(path).copied().unwrap_or(0);
            // git writes some of its own files several times, by renaming a lock onto them.
            assert!(times == 1 || times > 1 && moved(path), "{path} was created {times} times");
            seen += 1;
        }
        assert!(seen > 600, "{seen}");
    }
}

#[tokio::test]
async fn entries_come_when_asked_for() {
    let envd = Envd::start();
    let files = files(&envd);
    let root = tempfile::tempdir().unwrap();
    let wanted = WatchDirRequest { include_entry: true, ..request(root.path(), false) };
    let mut with = Watch::start(&files, wanted).await.unwrap();
    let mut without = Watch::start(&files, request(root.path(), false)).await.unwrap();
    fs::write(root.path().join("file"), "12345").unwrap();
    for kind in [EventType::EVENT_TYPE_CREATE, EventType::EVENT_TYPE_WRITE] {
        let event = with.next().await.unwrap();
        let entry = event.entry.as_option().unwrap();
        assert_eq!((event.r#type, &entry.path), (kind.into(), &text(&root.path().join("file"))));
        assert!(without.next().await.unwrap().entry.is_unset());
    }
    fs::rename(root.path().join("file"), root.path().join("other")).unwrap();
    fs::remove_file(root.path().join("other")).unwrap();
    for _ in 0..3 {
        let event = with.next().await.unwrap();
        let here = event.r#type == EventType::EVENT_TYPE_CREATE;
        assert!(here || event.entry.is_unset(), "{event:?}");
    }
}

#[tokio::test]
async fn what_cannot_be_watched_is_refused() {
    let envd = Envd::start();
    let files = files(&envd);
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("file");
    fs::write(&file, "").unwrap();
    for (path, expected) in [(&file, ErrorCode::InvalidArgument), (&root.path().join("absent"), ErrorCode::NotFound)] {
        assert_eq!(Watch::start(&files, request(path, true)).await.err().unwrap().code, expected);
        assert_eq!(create_watcher(&files, path, false).await.unwrap_err().code, expected);
    }
    let error = Watch::start_with(&files, request(root.path(), false), basic("nobody-here")).await.err().unwrap();
    assert_eq!(error.code, ErrorCode::Unauthenticated);
    assert_eq!(take(&files, "w-0").await.unwrap_err().code, ErrorCode::NotFound);
    assert_eq!(remove_watcher(&files, "w-0").await.unwrap_err().code, ErrorCode::NotFound);
}

/// A FUSE mount of somebody else, served by nobody.
struct Fuse(PathBuf, #[expect(dead_code, reason = "open as long as the mount")] File);

impl Fuse {
    fn mount(path: &Path) -> Fuse {
        let device = File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let data = format!("fd={},rootmode=40000,user_id=1000,group_id=1000", device.as_raw_fd());
        let data = std::ffi::CString::new(data).unwrap();
        rustix::mount::mount("none", path, "fuse", rustix::mount::MountFlags::empty(), data.as_c_str()).unwrap();
        Fuse(path.to_owned(), device)
    }
}

impl Drop for Fuse {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}

#[tokio::test]
async fn network_mounts_are_refused_unless_allowed_and_do_not_spoil_a_tree() {
    let envd = Envd::start();
    let files = files(&envd);
    let root = tempfile::tempdir().unwrap();
    let mount = root.path().join("mount");
    fs::create_dir(&mount).unwrap();
    let fuse = Fuse::mount(&mount);
    let error = Watch::start(&files, request(&mount, false)).await.err().unwrap();
    assert_eq!(error.code, ErrorCode::InvalidArgument);
    assert!(error.message.unwrap().contains("network filesystem"));
    // Root may not even look into this one.
    let allowed = WatchDirRequest { allow_network_mounts: true, ..request(&mount, false) };
    assert_eq!(Watch::start(&files, allowed).await.err().unwrap().code, ErrorCode::PermissionDenied);
    let listed = crate::entries::list(&files, &text(root.path()), 3).await.unwrap();
    assert_eq!((listed.len(), listed[0].name.as_str(), listed[0].permissions.as_str()), (1, "mount", "?---------"));
    let mut watch = Watch::start(&files, request(root.path(), true)).await.unwrap();
    File::create(root.path().join("end")).unwrap();
    assert_eq!(watch.until("end").await, []);
    drop(fuse);
}

#[tokio::test]
async fn idle_streams_say_so_and_deadlines_end_them() {
    let envd = Envd::start();
    let files = files(&envd);
    let root = tempfile::tempdir().unwrap();
    let options = CallOptions::default().with_header("keepalive-ping-interval", "1");
    let mut watch = Watch::start_with(&files, request(root.path(), true), options).await.unwrap();
    assert!(matches!(watch.event().await.unwrap(), Event::Keepalive(_)));
    File::create(root.path().join("file")).unwrap();
    while !matches!(watch.event().await.unwrap(), Event::Filesystem(_)) {}

    let options = CallOptions::default().with_timeout(Duration::from_secs(3));
    let mut watch = Watch::start_with(&files, request(root.path(), true), options).await.unwrap();
    assert_eq!(watch.event().await.unwrap_err().code, ErrorCode::DeadlineExceeded);
    drop(watch);
    eventually("the streams are gone", || inotifies(&envd) == 1).await;
}

#[tokio::test]
async fn a_watch_ends_with_its_directory() {
    let envd = Envd::start();
    let files = files(&envd);
    let root = tempfile::tempdir().unwrap();
    for recursive in [false, true] {
        let path = root.path().join("dir");
        fs::create_dir_all(path.join("sub")).unwrap();
        let mut removed_one = Watch::start(&files, request(&path, recursive)).await.unwrap();
        let id = create_watcher(&files, &path, recursive).await.unwrap();
        fs::remove_dir_all(&path).unwrap();
        for expected in [removed("sub"), removed(".")] {
            let event = removed_one.next().await.unwrap();
            assert_eq!((event.r#type.as_known().unwrap(), event.name), expected);
        }
        assert_eq!(removed_one.event().await.unwrap_err().code, ErrorCode::NotFound);
        let mut asked = Vec::new();
        let error = loop {
            match take(&files, &id).await {
                Ok(events) => asked.extend(events),
                Err(error) => break error,
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        assert_eq!((asked, error.code), (vec![removed("sub"), removed(".")], ErrorCode::NotFound));
        remove_watcher(&files, &id).await.unwrap();

        fs::create_dir(&path).unwrap();
        let mut moved = Watch::start(&files, request(&path, recursive)).await.unwrap();
        fs::rename(&path, root.path().join("elsewhere")).unwrap();
        let event = moved.next().await.unwrap();
        assert_eq!((event.r#type.as_known().unwrap(), event.name), renamed("."));
        assert_eq!(moved.event().await.unwrap_err().code, ErrorCode::NotFound);
        fs::remove_dir(root.path().join("elsewhere")).unwrap();
    }
}

#[tokio::test]
async fn a_caller_that_is_too_slow_is_told() {
    let envd = Envd::start();
    let files = files(&envd);
    let root = tempfile::tempdir().unwrap();
    let mut watch = Watch::start(&files, request(root.path(), false)).await.unwrap();
    let id = create_watcher(&files, root.path(), false).await.unwrap();
    // Far more than fits into sockets, the kernel's queue and ours.
    let long = "x".repeat(200);
    let names = [0, 1].map(|number| root.path().join(format!("{number}{long}")));
    for _ in 0..60_000 {
        for name in &names {
            File::create(name).unwrap();
        }
        for name in &names {
            fs::remove_file(name).unwrap();
        }
    }
    let mut count = 0;
    let error = loop {
        match watch.next().await {
            Ok(_) => count += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(error.code, ErrorCode::ResourceExhausted);
    assert!((1..240_000).contains(&count), "{count}");
    let mut asked = 0;
    let error = loop {
        match take(&files, &id).await {
            Ok(events) => asked += events.len(),
            Err(error) => break error,
        }
    };
    assert_eq!(error.code, ErrorCode::ResourceExhausted);
    assert!((1..=MAX_WAITING).contains(&asked), "{asked}");
    // Again and again, but what it held is given back.
    assert_eq!(take(&files, &id).await.unwrap_err().code, ErrorCode::ResourceExhausted);
    eventually("no descriptors", || inotifies(&envd) == 0).await;
    remove_watcher(&files, &id).await.unwrap();
}

#[tokio::test]
async fn watches_are_bounded_and_leave_nothing() {
    let envd = Envd::start();
    let files = files(&envd);
    let root = tempfile::tempdir().unwrap();
    fs::create_dir_all(root.path().join("a/b/c")).unwrap();
    Watch::start(&files, request(root.path(), true)).await.unwrap();
    eventually("no descriptors", || inotifies(&envd) == 0).await;
    let open = envd.open_files();
    for _ in 0..3 {
        let mut ids = Vec::new();
        for _ in 0..MAX_WATCHERS {
            ids.push(create_watcher(&files, root.path(), true).await.unwrap());
        }
        assert_eq!(create_watcher(&files, root.path(), true).await.unwrap_err().code, ErrorCode::ResourceExhausted);
        assert_eq!(inotifies(&envd), MAX_WATCHERS);
        let mut streams = Vec::new();
        for _ in 0..16 {
            streams.push(Watch::start(&files, request(root.path(), true)).await.unwrap());
        }
        fs::write(root.path().join("file"), "x").unwrap();
        for stream in &mut streams {
            stream.next().await.unwrap();
        }
        drop(streams);
        for id in &ids {
            remove_watcher(&files, id).await.unwrap();
            assert_eq!(take(&files, id).await.unwrap_err().code, ErrorCode::NotFound);
        }
        fs::remove_file(root.path().join("file")).unwrap();
        eventually("no descriptors", || inotifies(&envd) == 0).await;
    }
    // The client's own idle connections may have come or gone.
    eventually("no other descriptors either", || envd.open_files() <= open + 2).await;
}

async fn create_watcher(files: &Files, path: &Path, recursive: bool) -> Result<String, ConnectError> {
    let request = CreateWatcherRequest { path: text(path), recursive, ..Default::default() };
    Ok(files.create_watcher(request).await?.into_owned().watcher_id)
}

async fn take(files: &Files, id: &str) -> Result<Vec<(EventType, String)>, ConnectError> {
    let request = GetWatcherEventsRequest { watcher_id: id.to_owned(), ..Default::default() };
    let events = files.get_watcher_events(request).await?.into_owned().events;
    Ok(events.into_iter().map(|event| (event.r#type.as_known().unwrap(), event.name)).collect())
}

async fn remove_watcher(files: &Files, id: &str) -> Result<(), ConnectError> {
    files.remove_watcher(RemoveWatcherRequest { watcher_id: id.to_owned(), ..Default::default() }).await.map(drop)
}
