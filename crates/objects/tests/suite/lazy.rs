use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use objects::{CHUNK, Error, Lazy, Manifest};
use tokio::runtime::Handle;

use crate::world::{World, content};

const PATIENCE: Duration = Duration::from_secs(600);

/// A file system with nothing left on it, unmounted when dropped.
struct Full(PathBuf);

impl Full {
    fn mount(at: PathBuf) -> Self {
        fs::create_dir_all(&at).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("none", &at, "tmpfs", flags, Some(c"size=8m")).unwrap();
        let full = fs::write(at.join("other"), vec![1; 16 << 20]).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::StorageFull);
        Self(at)
    }

    fn make_room(&self) {
        fs::remove_file(self.0.join("other")).unwrap();
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}

async fn uploaded(world: &World) -> (Vec<u8>, Manifest) {
    let bytes = content(1, 4, 500);
    world.objects.upload("one", Vec::new(), vec![world.file("file", &bytes)]).await.unwrap();
    (bytes, world.objects.manifest("one").await.unwrap().unwrap())
}

fn open(world: &World, manifest: &Manifest) -> Arc<Lazy> {
    let dir = world.dir.path().join("lazy");
    fs::create_dir_all(&dir).unwrap();
    Arc::new(Lazy::open(world.objects.clone(), Handle::current(), &dir, manifest.files.clone()).unwrap())
}

async fn fill(lazy: &Arc<Lazy>) -> Result<(), Error> {
    let lazy = lazy.clone();
    tokio::task::spawn_blocking(move || lazy.fill()).await.unwrap()
}

async fn fetch(lazy: &Arc<Lazy>, bytes: std::ops::Range<u64>, patience: Duration) -> Result<(), Error> {
    let lazy = lazy.clone();
    tokio::task::spawn_blocking(move || lazy.fetch(0, bytes, patience)).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_touched_first_is_fetched_first() {
    let world = World::s3().await;
    let (bytes, manifest) = uploaded(&world).await;
    let lazy = open(&world, &manifest);
    let local = File::open(world.dir.path().join("lazy/file")).unwrap();
    assert_eq!(local.metadata().unwrap().len(), bytes.len() as u64);
    let before = world.s3.as_ref().unwrap().counts().1;
    let touched = 2 * CHUNK + 4096..2 * CHUNK + 8192;
    assert!(!lazy.is_present(0, touched.clone()));
    fetch(&lazy, touched.clone(), PATIENCE).await.unwrap();
    fetch(&lazy, touched.clone(), PATIENCE).await.unwrap();
    assert_eq!(world.s3.as_ref().unwrap().counts().1, before + 1);
    assert!(lazy.is_present(0, touched.clone()) && !lazy.is_present(0, 0..1));
    assert!(!lazy.is_present(0, 2 * CHUNK..3 * CHUNK + 1));
    let mut read = vec![0; 4096];
    local.read_exact_at(&mut read, touched.start).unwrap();
    assert_eq!(read, bytes[touched.start as usize..touched.end as usize]);

    fill(&lazy).await.unwrap();
    assert_eq!(fs::read(world.dir.path().join("lazy/file")).unwrap(), bytes);
    assert_eq!(world.s3.as_ref().unwrap().counts().1, before + 5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_who_want_one_chunk_share_it() {
    let world = World::s3().await;
    let (_, manifest) = uploaded(&world).await;
    let lazy = open(&world, &manifest);
    let before = world.s3.as_ref().unwrap().counts().1;
    let fetches: Vec<_> = (0..10).map(|at| (at * 4096, lazy.clone())).collect();
    let fetches = fetches.into_iter().map(async |(at, lazy)| fetch(&lazy, at..at + 4096, PATIENCE).await.unwrap());
    futures::future::join_all(fetches).await;
    assert_eq!(world.s3.as_ref().unwrap().counts().1, before + 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_there_after_a_crash_is_checked_and_not_believed() {
    let world = World::s3().await;
    let (bytes, manifest) = uploaded(&world).await;
    let lazy = open(&world, &manifest);
    fetch(&lazy, 0..3 * CHUNK, PATIENCE).await.unwrap();
    drop(lazy);
    // The second was half-written when the machine stopped.
    let local = File::options().write(true).open(world.dir.path().join("lazy/file")).unwrap();
    local.write_all_at(&[0; 1000], CHUNK + 5000).unwrap();
    let lazy = open(&world, &manifest);
    let present: Vec<_> = (0..5).map(|index| lazy.is_present(0, index * CHUNK..index * CHUNK + 1)).collect();
    assert_eq!(present, [true, false, true, false, false]);
    fill(&lazy).await.unwrap();
    assert_eq!(fs::read(world.dir.path().join("lazy/file")).unwrap(), bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_for_a_store_that_is_gone_is_told() {
    let mut world = World::s3().await;
    let (_, manifest) = uploaded(&world).await;
    let lazy = open(&world, &manifest);
    world.s3_mut().stop().await;
    let error = fetch(&lazy, 0..1, Duration::ZERO).await.unwrap_err();
    assert!(error.is_passing(), "{error:?}");
    let waiting = {
        let lazy = lazy.clone();
        tokio::spawn(async move { fetch(&lazy, 0..1, PATIENCE).await })
    };
    world.s3_mut().restart().await;
    waiting.await.unwrap().unwrap();
    for chunk in world.chunks() {
        fs::remove_file(chunk).unwrap();
    }
    // Waiting does not bring it back.
    let error = fetch(&lazy, CHUNK..CHUNK + 1, PATIENCE).await.unwrap_err();
    assert!(matches!(error, Error::Missing(_)), "{error:?}");
    assert!(matches!(fill(&lazy).await.unwrap_err(), Error::Missing(_)));
    assert!(lazy.is_present(0, 0..1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_no_room_comes_once_it_has() {
    let world = World::s3().await;
    let (bytes, manifest) = uploaded(&world).await;
    let full = Full::mount(world.dir.path().join("lazy"));
    let lazy = open(&world, &manifest);
    let before = world.s3.as_ref().unwrap().counts().1;
    let filling = {
        let lazy = lazy.clone();
        tokio::spawn(async move { fill(&lazy).await })
    };
    // It fetches three at once: with the fourth, one of them has found the disk full.
    while world.s3.as_ref().unwrap().counts().1 < before + 4 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let error = fetch(&lazy, 0..1, Duration::ZERO).await.unwrap_err();
    assert!(matches!(&error, Error::File { source, .. } if source.kind() == io::ErrorKind::StorageFull), "{error:?}");
    let waiting = {
        let lazy = lazy.clone();
        tokio::spawn(async move { fetch(&lazy, 0..1, PATIENCE).await })
    };
    // Until it has most likely found the disk full too.
    tokio::time::sleep(Duration::from_millis(500)).await;
    full.make_room();
    waiting.await.unwrap().unwrap();
    filling.await.unwrap().unwrap();
    assert_eq!(fs::read(world.dir.path().join("lazy/file")).unwrap(), bytes);
}
