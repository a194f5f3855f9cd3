use std::fs;
use std::time::Duration;

use objects::{CHUNK, Config, Error, Manifest, Objects};

use crate::world::{World, content};

#[tokio::test]
async fn what_no_manifest_names_is_collected_and_nothing_else() {
    for world in World::both().await {
        let (shared, own) = (content(1, 3, 0), content(2, 2, 0));
        world.objects.upload("capsules/a", Vec::new(), vec![world.file("file", &shared)]).await.unwrap();
        let both = [shared.clone(), own].concat();
        world.objects.upload("templates/b", Vec::new(), vec![world.file("file", &both)]).await.unwrap();
        fs::write(world.folder.join("chunks/foreign"), b"somebody else's").unwrap();
        world.objects.forget("templates/b").await.unwrap();

        let audit = world.objects.audit().await.unwrap();
        assert_eq!((audit.used.objects, audit.garbage.objects), (3, 2));
        assert_eq!((audit.uploads, audit.foreign.len()), (vec!["capsules/a".to_owned()], 1));
        // Somebody may still be reading.
        let young = world.objects.collect(Duration::from_secs(3600), Duration::ZERO).await.unwrap();
        assert_eq!(young.objects, 0);
        let collected = world.objects.collect(Duration::ZERO, Duration::ZERO).await.unwrap();
        assert_eq!(collected, audit.garbage);
        let audit = world.objects.audit().await.unwrap();
        assert_eq!((audit.used.objects, audit.garbage.objects, audit.missing.len()), (3, 0, 0));
        assert_eq!(world.downloaded("capsules/a", "file").await.unwrap(), shared);
        // No lease is left.
        for leases in ["uploads", "collections"] {
            assert_eq!(fs::read_dir(world.folder.join(leases)).into_iter().flatten().count(), 0);
        }
    }
}

#[tokio::test]
async fn nothing_is_collected_while_a_manifest_cannot_be_read() {
    let world = World::folder();
    world.objects.upload("one", Vec::new(), vec![world.file("file", &content(1, 1, 0))]).await.unwrap();
    fs::write(world.folder.join("manifests/one"), b"WRENNOBJ of a later version").unwrap();
    let error = world.objects.collect(Duration::ZERO, Duration::ZERO).await.unwrap_err();
    assert!(matches!(error, Error::Manifest { .. }), "{error:?}");
    assert_eq!(world.chunks().len(), 1);
    assert_eq!(world.objects.audit().await.unwrap().broken.len(), 1);
    assert_eq!(fs::read_dir(world.folder.join("collections")).unwrap().count(), 0);
}

#[tokio::test]
async fn an_upload_that_relies_on_garbage_is_not_robbed_of_it() {
    let world = World::s3().await;
    let s3 = world.s3.as_ref().unwrap();
    let mut bytes = content(1, 3, 0);
    world.objects.upload("one", Vec::new(), vec![world.file("file", &bytes)]).await.unwrap();
    world.objects.forget("one").await.unwrap();
    // Three chunks are garbage that this one finds; it stops at the fourth, before its manifest.
    bytes.extend(content(2, 1, 0));
    s3.let_write(Some(1));
    let before = s3.counts().0;
    let upload = {
        let (objects, source) = (world.objects.clone(), world.file("file", &bytes));
        tokio::spawn(async move { objects.upload("one", Vec::new(), vec![source]).await })
    };
    s3.until_written(before + 2).await;
    let collection = {
        let objects = world.objects.clone();
        tokio::spawn(async move { objects.collect(Duration::ZERO, Duration::from_secs(600)).await })
    };
    s3.until_written(before + 3).await;
    s3.let_write(None);
    assert_eq!(upload.await.unwrap().unwrap().chunks, 1);
    assert_eq!(collection.await.unwrap().unwrap().objects, 0);
    assert_eq!(world.downloaded("one", "file").await.unwrap(), bytes);
}

#[tokio::test]
async fn an_upload_that_was_taken_for_dead_is_not_one() {
    let world = World::s3().await;
    let s3 = world.s3.as_ref().unwrap();
    let mut bytes = content(1, 3, 0);
    world.objects.upload("one", Vec::new(), vec![world.file("file", &bytes)]).await.unwrap();
    world.objects.forget("one").await.unwrap();
    // It finds three chunks, and stands still at the fourth.
    bytes.extend(content(2, 1, 0));
    s3.let_write(Some(1));
    let before = s3.counts().0;
    let upload = {
        let (objects, source) = (world.objects.clone(), world.file("file", &bytes));
        tokio::spawn(async move { objects.upload("one", Vec::new(), vec![source]).await })
    };
    s3.until_written(before + 2).await;
    let lease = fs::read_dir(world.folder.join("uploads")).unwrap().next().unwrap().unwrap().path();
    let lease = fs::File::options().write(true).open(lease).unwrap();
    lease.set_modified(std::time::SystemTime::now() - Duration::from_secs(3600)).unwrap();
    // Another way to the same objects, on which nothing stands still.
    let folder = Config::parse(&format!("file://{}", world.folder.display()), []).unwrap();
    let other = Objects::open(&folder).unwrap();
    assert_eq!(other.collect(Duration::ZERO, Duration::ZERO).await.unwrap().objects, 3);
    s3.let_write(None);
    let error = upload.await.unwrap().unwrap_err();
    assert!(matches!(error, Error::Lapsed) && error.is_passing(), "{error:?}");
    assert!(world.objects.manifest("one").await.unwrap().is_none());
    world.objects.upload("one", Vec::new(), vec![world.source("file")]).await.unwrap();
    assert_eq!(world.downloaded("one", "file").await.unwrap(), bytes);
}

#[tokio::test]
async fn a_collection_gives_up_while_an_upload_may_be_under_way() {
    let world = World::s3().await;
    let s3 = world.s3.as_ref().unwrap();
    // The second time all but the manifest: lease, chunk, and the lease again.
    for (passes, is_left) in [(1, false), (3, true)] {
        let before = s3.counts().0;
        s3.let_write(Some(passes));
        let upload = {
            let (objects, source) = (world.objects.clone(), world.file("file", &content(1, 1, 0)));
            tokio::spawn(async move { objects.upload("one", Vec::new(), vec![source]).await })
        };
        s3.until_written(before + passes + 1).await;
        upload.abort();
        assert!(upload.await.unwrap_err().is_cancelled());
        s3.let_write(None);
        if !is_left {
            // It says itself that it is gone.
            world.objects.collect(Duration::ZERO, Duration::from_secs(60)).await.unwrap();
            continue;
        }
        // Its manifest may be on the way: nobody can know before it is too old.
        let error = world.objects.collect(Duration::ZERO, Duration::ZERO).await.unwrap_err();
        assert!(matches!(error, Error::Uploading) && error.is_passing(), "{error:?}");
    }
}

#[tokio::test]
async fn an_upload_waits_for_a_collection() {
    let world = World::folder();
    let lease = world.folder.join("collections/another");
    fs::create_dir_all(lease.parent().unwrap()).unwrap();
    fs::write(&lease, b"").unwrap();
    let upload = {
        let (objects, source) = (world.objects.clone(), world.file("file", &content(1, 1, 0)));
        tokio::spawn(async move { objects.upload("one", Vec::new(), vec![source]).await })
    };
    // It has been there, and has gone back to wait.
    let uploads = world.folder.join("uploads");
    while !uploads.exists() || fs::read_dir(&uploads).unwrap().count() > 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(world.chunks().len(), 0);
    fs::remove_file(&lease).unwrap();
    assert_eq!(upload.await.unwrap().unwrap().chunks, 1);
}

#[tokio::test]
async fn what_a_killed_process_left_is_soon_too_old_to_count() {
    let world = World::folder();
    for lease in ["collections/dead", "uploads/dead"] {
        let lease = world.folder.join(lease);
        fs::create_dir_all(lease.parent().unwrap()).unwrap();
        let file = fs::File::create(&lease).unwrap();
        file.set_modified(std::time::SystemTime::now() - Duration::from_secs(3600)).unwrap();
    }
    world.objects.upload("one", Vec::new(), vec![world.file("file", &content(1, 1, 0))]).await.unwrap();
    world.objects.collect(Duration::ZERO, Duration::ZERO).await.unwrap();
    assert_eq!(world.chunks().len() as u64 * CHUNK, CHUNK);
}

#[tokio::test]
async fn what_is_there_for_others_goes_when_none_of_them_needs_it() {
    let world = World::folder();
    let (used, unused, later) = ("images/used", "images/unused", "images/later");
    for (index, name) in [used, unused, later].into_iter().enumerate() {
        let source = world.file("image", &content(index as u8, 1, 0));
        world.objects.upload(name, Vec::new(), vec![source]).await.unwrap();
    }
    world.objects.upload("capsules/a", used.into(), Vec::new()).await.unwrap();
    let needs = |manifest: &Manifest| Some(vec![String::from_utf8(manifest.description.clone()).unwrap()]);
    let needs = |manifest: &Manifest| if manifest.description.is_empty() { Some(Vec::new()) } else { needs(manifest) };
    let collect = async |grace| world.objects.collect_unneeded("images", grace, Duration::ZERO, needs).await.unwrap();
    assert_eq!(collect(Duration::from_secs(3600)).await, 0);
    let nobody_knows = world.objects.collect_unneeded("images", Duration::ZERO, Duration::ZERO, |_| None);
    assert_eq!(nobody_knows.await.unwrap(), 0);
    assert_eq!(collect(Duration::ZERO).await, 2);
    let mut left = world.objects.audit().await.unwrap().uploads;
    left.sort();
    assert_eq!(left, ["capsules/a", used]);
    assert_eq!(fs::read_dir(world.folder.join("collections")).unwrap().count(), 0);
}
