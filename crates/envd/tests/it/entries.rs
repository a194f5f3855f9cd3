//! Files over the wire: describing, making, moving, listing and removing them.

use crate::harness::*;
use connectrpc::client::{CallOptions, ClientConfig, HttpClient};
use connectrpc::{CodecFormat, ConnectError, ErrorCode};
use guest_api::filesystem::*;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

pub type Files = FilesystemClient<HttpClient>;

pub fn files(envd: &Envd) -> Files {
    files_in(envd, CodecFormat::Proto)
}

pub fn files_in(envd: &Envd, codec: CodecFormat) -> Files {
    let config = ClientConfig::new(format!("http://{}", envd.address).parse().unwrap()).with_codec_format(codec);
    FilesystemClient::new(HttpClient::plaintext(), config.with_default_max_message_size(1 << 28))
}

pub fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

pub async fn stat(files: &Files, path: &str) -> Result<EntryInfo, ConnectError> {
    let answer = files.stat(StatRequest { path: path.to_owned(), ..Default::default() }).await?;
    Ok(answer.into_owned().entry.into_option().unwrap())
}

pub async fn list(files: &Files, path: &str, depth: u32) -> Result<Vec<EntryInfo>, ConnectError> {
    let answer = files.list_dir(ListDirRequest { path: path.to_owned(), depth, ..Default::default() }).await?;
    Ok(answer.into_owned().entries)
}

async fn make(files: &Files, path: &str, options: CallOptions) -> Result<EntryInfo, ConnectError> {
    let request = MakeDirRequest { path: path.to_owned(), ..Default::default() };
    Ok(files.make_dir_with_options(request, options).await?.into_owned().entry.into_option().unwrap())
}

async fn rename(files: &Files, source: &str, destination: &str) -> Result<EntryInfo, ConnectError> {
    let (source, destination) = (source.to_owned(), destination.to_owned());
    let answer = files.r#move(MoveRequest { source, destination, ..Default::default() }).await?;
    Ok(answer.into_owned().entry.into_option().unwrap())
}

async fn remove(files: &Files, path: &str) -> Result<(), ConnectError> {
    files.remove(RemoveRequest { path: path.to_owned(), ..Default::default() }).await.map(drop)
}

fn code<T: std::fmt::Debug>(result: Result<T, ConnectError>) -> ErrorCode {
    result.unwrap_err().code
}

#[tokio::test]
async fn made_directories_are_the_users_and_open() {
    let envd = Envd::start();
    let files = files(&envd);
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("a/b");
    let entry = make(&files, &text(&path), basic("daemon")).await.unwrap();
    assert_eq!((entry.name.as_str(), entry.path.as_str(), entry.owner.as_str()), ("b", text(&path).as_str(), "daemon"));
    assert_eq!(
        (entry.r#type, entry.mode, entry.permissions.as_str()),
        (FileType::FILE_TYPE_DIRECTORY.into(), 0o755, "drwxr-xr-x")
    );
    for made in [&path, path.parent().unwrap()] {
        let metadata = std::fs::metadata(made).unwrap();
        assert_eq!((metadata.uid(), metadata.gid(), metadata.mode() & 0o7777), (1, 1, 0o755));
    }
    assert_eq!(std::fs::metadata(root.path()).unwrap().uid(), 0);

    assert_eq!(code(make(&files, &text(&path), CallOptions::default()).await), ErrorCode::AlreadyExists);
    std::fs::write(root.path().join("file"), "").unwrap();
    symlink("nowhere", root.path().join("dangling")).unwrap();
    for blocked in ["file", "file/x", "file/x/y", "dangling", "dangling/x"] {
        let path = text(&root.path().join(blocked));
        assert_eq!(code(make(&files, &path, CallOptions::default()).await), ErrorCode::InvalidArgument, "{blocked}");
    }
    let error = make(&files, "/tmp/never", basic("nobody-here")).await.unwrap_err();
    assert_eq!(
        (error.code, error.message.as_deref()),
        (ErrorCode::Unauthenticated, Some("invalid username: 'nobody-here'"))
    );
    assert!(!Path::new("/tmp/never").exists());
}

#[tokio::test]
async fn moving_makes_parents_and_replaces_files() {
    let envd = Envd::start();
    let files = files(&envd);
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| text(&root.path().join(name));
    std::fs::write(at("a"), "one").unwrap();
    let entry = rename(&files, &at("a"), &at("x/y/b")).await.unwrap();
    assert_eq!((entry.path, entry.size), (at("x/y/b"), 3));
    assert!(!Path::new(&at("a")).exists());
    std::fs::write(at("c"), "longer").unwrap();
    assert_eq!(rename(&files, &at("c"), &at("x/y/b")).await.unwrap().size, 6);

    assert_eq!(code(rename(&files, &at("absent"), &at("new/parent")).await), ErrorCode::NotFound);
    assert!(!Path::new(&at("new")).exists(), "nothing is made for what cannot be moved");
    assert_eq!(code(rename(&files, &at("x"), &at("x/y/z")).await), ErrorCode::InvalidArgument);
    std::fs::create_dir(at("full")).unwrap();
    std::fs::write(at("full/file"), "").unwrap();
    assert_eq!(code(rename(&files, &at("x"), &at("full")).await), ErrorCode::FailedPrecondition);
    assert_eq!(code(rename(&files, &at("x"), &at("full/file/z")).await), ErrorCode::InvalidArgument);
    assert_eq!(code(rename(&files, "", &at("z")).await), ErrorCode::InvalidArgument);
    // Links are moved, not what they lead to.
    symlink("x", at("link")).unwrap();
    assert!(rename(&files, &at("link"), &at("moved")).await.unwrap().is_symlink);
    assert!(Path::new(&at("x")).exists());
    let elsewhere = tempfile::tempdir_in("/dev/shm").unwrap();
    let destination = text(&elsewhere.path().join("x"));
    assert_eq!(code(rename(&files, &at("x"), &destination).await), ErrorCode::FailedPrecondition);
}

#[tokio::test]
async fn removing_takes_everything_inside_and_minds_nothing_absent() {
    let envd = Envd::start();
    let files = files(&envd);
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| text(&root.path().join(name));
    std::fs::create_dir_all(at("keep")).unwrap();
    std::fs::write(at("keep/file"), "").unwrap();
    std::fs::create_dir_all(at("tree/a/b")).unwrap();
    symlink(at("keep"), at("tree/a/link")).unwrap();
    symlink(at("keep"), at("link")).unwrap();
    for gone in ["tree", "link", "absent", "tree", "keep/file/below"] {
        remove(&files, &at(gone)).await.unwrap();
        assert!(std::fs::symlink_metadata(at(gone)).is_err());
    }
    assert!(Path::new(&at("keep/file")).exists());
    for refused in ["", "/", "/tmp/..", "~nobody"] {
        assert_eq!(code(remove(&files, refused).await), ErrorCode::InvalidArgument, "{refused}");
    }
}

#[tokio::test]
async fn of_many_that_remove_the_same_one_did() {
    let envd = Envd::start();
    let files = files(&envd);
    let root = tempfile::tempdir().unwrap();
    let path = text(&root.path().join("tree"));
    let mut kinds = ["file", "directory"].iter().cycle();
    for _ in 0..100 {
        match *kinds.next().unwrap() {
            "file" => std::fs::write(&path, "").unwrap(),
            _ => std::fs::create_dir_all(root.path().join("tree/a/b")).unwrap(),
        }
        let request = || RemoveRequest { path: path.clone(), must_exist: true, ..Default::default() };
        let removed = futures::future::join_all((0..8).map(|_| files.remove(request()))).await;
        let (done, late): (Vec<_>, Vec<_>) = removed.into_iter().partition(Result::is_ok);
        assert_eq!(done.len(), 1);
        assert!(late.into_iter().all(|late| code(late.map(drop)) == ErrorCode::NotFound));
    }
    let below = format!("{}/file/below", root.path().display());
    std::fs::write(root.path().join("file"), "").unwrap();
    let request = RemoveRequest { path: below, must_exist: true, ..Default::default() };
    assert_eq!(code(files.remove(request).await.map(drop)), ErrorCode::NotFound);
}

#[tokio::test]
async fn a_tree_deeper_than_descriptors_and_paths_go_is_removed() {
    use rustix::fs::{Mode, OFlags, mkdirat, openat};
    let envd = Envd::start();
    let files = files(&envd);
    let root = tempfile::tempdir().unwrap();
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    let mut at = rustix::fs::open(root.path(), flags, Mode::empty()).unwrap();
    for _ in 0..3000 {
        mkdirat(&at, "deep", Mode::RWXU).unwrap();
        openat(&at, "file", OFlags::CREATE | OFlags::WRONLY, Mode::RWXU).unwrap();
        at = openat(&at, "deep", flags, Mode::empty()).unwrap();
    }
    // Beyond what a path can name there are entries without descriptions, but no error.
    let entries = list(&files, &text(root.path()), u32::MAX).await.unwrap();
    assert!(entries.len() > 1000, "{}", entries.len());
    remove(&files, &text(&root.path().join("deep"))).await.unwrap();
    assert!(!root.path().join("deep").exists());
}

#[tokio::test]
async fn links_are_described_with_what_they_lead_to() {
    let envd = Envd::start();
    let files = files(&envd);
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| text(&root.path().join(name));
    std::fs::create_dir(at("dir")).unwrap();
    std::fs::write(at("dir/test.txt"), "12345").unwrap();
    std::fs::set_permissions(at("dir/test.txt"), std::fs::Permissions::from_mode(0o4640)).unwrap();
    symlink("dir/test.txt", at("file-link")).unwrap();
    symlink("dir", at("dir-link")).unwrap();
    symlink("dir-link", at("chain")).unwrap();
    symlink("../gone/./x", at("dangling")).unwrap();
    symlink("cycle", at("cycle")).unwrap();

    let link = stat(&files, &at("file-link")).await.unwrap();
    assert_eq!((link.is_symlink, link.r#type, link.mode), (true, FileType::FILE_TYPE_FILE.into(), 0o4640));
    assert_eq!((link.symlink_target, link.permissions.as_str()), (Some(at("dir/test.txt")), "Lrwxrwxrwx"));
    let file = stat(&files, &at("dir/../dir//test.txt")).await.unwrap();
    assert_eq!((file.path, file.permissions.as_str(), file.size), (at("dir/test.txt"), "-rwSr-----", 5));
    assert_eq!((file.is_symlink, file.symlink_target), (false, None));
    for name in ["dir-link", "chain"] {
        let link = stat(&files, &at(name)).await.unwrap();
        assert_eq!((link.r#type, link.symlink_target), (FileType::FILE_TYPE_DIRECTORY.into(), Some(at("dir"))));
    }
    let parent = root.path().parent().unwrap();
    for (name, target) in [("dangling", text(&parent.join("gone/x"))), ("cycle", at("cycle"))] {
        let link = stat(&files, &at(name)).await.unwrap();
        assert_eq!((link.r#type, link.mode), (FileType::FILE_TYPE_SYMLINK.into(), 0));
        assert_eq!((link.is_symlink, link.symlink_target), (true, Some(target)));
    }
    let paths = |entries: Vec<EntryInfo>| entries.into_iter().map(|entry| entry.path).collect::<Vec<_>>();
    let all = ["chain", "cycle", "dangling", "dir", "dir/test.txt", "dir-link", "file-link"].map(at);
    assert_eq!(paths(list(&files, &at(""), 9).await.unwrap()), all);
    // The directory asked for may be a link, and the answer keeps its name.
    assert_eq!(paths(list(&files, &at("chain/"), 1).await.unwrap()), [at("chain/test.txt")]);
    assert_eq!(code(list(&files, &at("file-link"), 1).await), ErrorCode::InvalidArgument);
    assert_eq!(code(list(&files, &at("dangling"), 1).await), ErrorCode::NotFound);
    assert_eq!(code(list(&files, &at("cycle"), 1).await), ErrorCode::FailedPrecondition);
    assert_eq!(code(list(&files, &at("absent"), 1).await), ErrorCode::NotFound);
    assert_eq!(code(stat(&files, &at("absent")).await), ErrorCode::NotFound);
    assert_eq!(code(stat(&files, &at("dir/test.txt/x")).await), ErrorCode::NotFound);
}

#[tokio::test]
async fn depth_zero_is_one_and_names_may_be_anything() {
    let envd = Envd::start();
    let files = files_in(&envd, CodecFormat::Json);
    let root = tempfile::tempdir().unwrap();
    let odd = std::ffi::OsStr::from_bytes(b"odd\xff\n");
    std::fs::create_dir_all(root.path().join("b/c/d")).unwrap();
    std::fs::create_dir(root.path().join(odd)).unwrap();
    std::fs::write(root.path().join(odd).join("inside"), "x").unwrap();
    let names = async |depth| {
        let entries = list(&files, &text(root.path()), depth).await.unwrap();
        entries.into_iter().map(|entry| entry.name).collect::<Vec<_>>()
    };
    assert_eq!(names(0).await, ["b", "odd\u{fffd}\n"]);
    assert_eq!(names(1).await, names(0).await);
    assert_eq!(names(2).await, ["b", "c", "odd\u{fffd}\n", "inside"]);
    assert_eq!(names(u32::MAX).await, ["b", "c", "d", "odd\u{fffd}\n", "inside"]);
}

#[tokio::test]
async fn metadata_comes_with_the_entry() {
    let envd = Envd::start();
    let files = files(&envd);
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("file");
    let file = std::fs::File::create(&path).unwrap();
    let metadata = std::collections::BTreeMap::from([("author".to_owned(), "me".to_owned())]);
    envd::metadata::replace(&file, &metadata).unwrap();
    let listed = list(&files, &text(root.path()), 1).await.unwrap().remove(0);
    for entry in [stat(&files, &text(&path)).await.unwrap(), listed] {
        assert_eq!(entry.metadata.into_iter().collect::<std::collections::BTreeMap<_, _>>(), metadata);
    }
}

#[tokio::test]
async fn a_hundred_thousand_entries_are_listed_and_their_memory_given_back() {
    const COUNT: usize = 100_000;
    let envd = Envd::start();
    let files = files(&envd);
    let root = tempfile::tempdir().unwrap();
    for number in 0..COUNT {
        std::fs::File::create(root.path().join(format!("{number:06}"))).unwrap();
    }
    let path = text(root.path());
    let mut memory = 0;
    for round in 0..4 {
        let entries = list(&files, &path, 1).await.unwrap();
        assert_eq!(entries.len(), COUNT);
        assert!(entries.iter().enumerate().all(|(number, entry)| entry.name == format!("{number:06}")));
        if round == 1 {
            memory = envd.resident();
        }
    }
    let grown = envd.resident().saturating_sub(memory);
    assert!(grown < 32 << 20, "{grown} bytes more");
}

#[tokio::test]
async fn a_listing_survives_what_vanishes_meanwhile() {
    let envd = Envd::start();
    let files = files(&envd);
    let root = tempfile::tempdir().unwrap();
    std::fs::write(root.path().join("stays"), "").unwrap();
    let busy = root.path().to_owned();
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped = std::sync::Arc::clone(&stop);
    let churn = std::thread::spawn(move || {
        while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
            for number in 0..50 {
                let directory = busy.join(format!("d{number}"));
                std::fs::create_dir(&directory).unwrap();
                std::fs::write(directory.join("file"), "x").unwrap();
            }
            for number in 0..50 {
                std::fs::remove_dir_all(busy.join(format!("d{number}"))).unwrap();
            }
        }
    });
    for _ in 0..50 {
        let entries = list(&files, &text(root.path()), 3).await.unwrap();
        assert!(entries.iter().any(|entry| entry.name == "stays"));
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    churn.join().unwrap();
}
