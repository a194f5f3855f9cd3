use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use objects::{CHUNK, Chunk, Sent};

use crate::world::{World, content};

#[tokio::test]
async fn what_is_uploaded_comes_back() {
    for world in World::both().await {
        let odd = content(1, 2, 77);
        let mut zeros = content(2, 3, 0);
        zeros[CHUNK as usize..2 * CHUNK as usize].fill(0);
        let sparse = world.dir.path().join("sparse");
        File::create(&sparse).unwrap().set_len(5 * CHUNK + 1).unwrap();
        File::options().write(true).open(&sparse).unwrap().write_all_at(b"x", 3 * CHUNK).unwrap();
        let files = vec![
            world.file("odd", &odd),
            world.file("zeros", &zeros),
            world.file("empty", b""),
            world.source("sparse"),
        ];
        assert!(world.objects.manifest("capsules/one").await.unwrap().is_none());
        world.objects.upload("capsules/one", b"described".to_vec(), files).await.unwrap();

        let manifest = world.objects.manifest("capsules/one").await.unwrap().unwrap();
        assert_eq!(manifest.description, b"described");
        assert_eq!(world.objects.names("capsules").await.unwrap(), ["capsules/one"]);
        for (name, content) in [("odd", odd), ("zeros", zeros), ("empty", Vec::new())] {
            assert_eq!(world.downloaded("capsules/one", name).await.unwrap(), content, "{name}");
        }
        assert_eq!(world.downloaded("capsules/one", "sparse").await.unwrap(), fs::read(&sparse).unwrap());
        let zero = manifest.file("sparse").unwrap().chunks.iter().filter(|chunk| **chunk == Chunk::Zero).count();
        assert_eq!(zero, 5);

        world.objects.forget("capsules/one").await.unwrap();
        world.objects.forget("capsules/one").await.unwrap();
        assert!(world.objects.manifest("capsules/one").await.unwrap().is_none());
    }
}

#[tokio::test]
async fn only_what_changed_is_sent() {
    for world in World::both().await {
        let mut bytes = content(1, 6, 0);
        let first = world.objects.upload("one", Vec::new(), vec![world.file("file", &bytes)]).await.unwrap();
        assert_eq!(first.chunks, 6);
        bytes[3 * CHUNK as usize + 5] ^= 1;
        let second = world.objects.upload("one", Vec::new(), vec![world.file("file", &bytes)]).await.unwrap();
        assert_eq!(second.chunks, 1);
        assert!(second.bytes < first.bytes);
        // Somebody else has the same, at another place.
        bytes.rotate_left(CHUNK as usize);
        let other = world.objects.upload("two", Vec::new(), vec![world.file("other", &bytes)]).await.unwrap();
        assert_eq!(other, Sent::default());
        assert_eq!(world.downloaded("two", "other").await.unwrap(), bytes);
    }
}

#[tokio::test]
async fn one_chunk_many_times_is_sent_once() {
    let world = World::folder();
    let bytes = content(1, 1, 0).repeat(20);
    world.objects.upload("one", Vec::new(), vec![world.file("file", &bytes)]).await.unwrap();
    assert_eq!(world.chunks().len(), 1);
}

#[tokio::test]
async fn what_the_image_has_is_not_sent() {
    for world in World::both().await {
        let image = content(1, 4, 100);
        let mut disk = image.clone();
        disk.resize(7 * CHUNK as usize, 0);
        disk[CHUNK as usize] ^= 1;
        disk[2 * CHUNK as usize..3 * CHUNK as usize].fill(0);
        world.file("image", &image);
        let mut source = world.file("disk", &disk);
        source.base = Some(world.base("image", Vec::new()));
        let sent = world.objects.upload("one", Vec::new(), vec![source]).await.unwrap();
        // The changed one, and the one in which the image ends.
        assert_eq!(sent.chunks, 2);
        let manifest = world.objects.manifest("one").await.unwrap().unwrap();
        let base = manifest.files[0].chunks.iter().filter(|chunk| **chunk == Chunk::Base).count();
        assert_eq!(base, 2);

        fs::write(world.dir.path().join("clone"), &image).unwrap();
        let clone = File::options().read(true).write(true).open(world.dir.path().join("clone")).unwrap();
        world.objects.download(&manifest.files[0], clone).await.unwrap();
        assert_eq!(fs::read(world.dir.path().join("clone")).unwrap(), disk);
    }
}

/// Bytes that this process has read.
fn bytes_read() -> u64 {
    let io = fs::read_to_string("/proc/self/io").unwrap();
    io.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap().parse().unwrap()
}

#[tokio::test]
async fn what_is_known_is_not_read() {
    let world = World::folder();
    let (image, disk) = (2048 * CHUNK + 10, 4096 * CHUNK + 20);
    for (name, size) in [("image", image), ("disk", disk)] {
        let file = File::create(world.dir.path().join(name)).unwrap();
        file.set_len(size).unwrap();
        file.write_all_at(&content(1, 1, 0), 5 * CHUNK).unwrap();
    }
    let mut source = world.source("disk");
    // Of the written chunk only a part: it is read.
    source.base = Some(world.base("image", vec![0..5 * CHUNK + 100, 6 * CHUNK - 100..image]));
    let before = bytes_read();
    let sent = world.objects.upload("one", Vec::new(), vec![source]).await.unwrap();
    let read = bytes_read() - before;
    // The written chunk, and the one in which the image ends.
    assert!((2 * CHUNK..8 * CHUNK).contains(&read), "{read} bytes");
    assert_eq!(sent, Sent::default());
    let chunks = &world.objects.manifest("one").await.unwrap().unwrap().files[0].chunks;
    let (base, zero) = chunks.split_at(2048);
    assert!(base.iter().all(|chunk| *chunk == Chunk::Base) && zero.iter().all(|chunk| *chunk == Chunk::Zero));
}

#[tokio::test]
async fn what_is_named_by_its_content_is_not_read_again() {
    let world = World::folder();
    let bytes = content(1, 3, 0);
    let mut source = world.file("file", &bytes);
    source.is_named_by_content = true;
    world.objects.upload("one", Vec::new(), vec![source]).await.unwrap();
    // Who breaks the promise sees that it is relied on; what is lost in the store is sent again all the same.
    let mut source = world.file("file", &content(2, 3, 0));
    source.is_named_by_content = true;
    assert_eq!(world.objects.upload("one", Vec::new(), vec![source]).await.unwrap(), Sent::default());
    assert_eq!(world.downloaded("one", "file").await.unwrap(), bytes);
    let mut source = world.file("file", &bytes);
    source.is_named_by_content = true;
    fs::remove_file(&world.chunks()[0]).unwrap();
    assert_eq!(world.objects.upload("one", Vec::new(), vec![source]).await.unwrap().chunks, 1);
}

#[tokio::test]
async fn an_upload_that_is_broken_off_leaves_what_was_there() {
    let world = World::s3().await;
    let s3 = world.s3.as_ref().unwrap();
    let (old, new) = (content(1, 2, 0), content(2, 12, 0));
    world.objects.upload("one", b"old".to_vec(), vec![world.file("file", &old)]).await.unwrap();
    let before = s3.counts().0;
    s3.let_write(Some(5));
    let upload = {
        let (objects, source) = (world.objects.clone(), world.file("file", &new));
        tokio::spawn(async move { objects.upload("one", b"new".to_vec(), vec![source]).await })
    };
    // Its lease and four chunks are written, the next waits.
    s3.until_written(before + 6).await;
    while world.chunks().len() < 2 + 4 {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    upload.abort();
    assert!(upload.await.unwrap_err().is_cancelled());
    s3.let_write(None);
    assert_eq!(world.downloaded("one", "file").await.unwrap(), old);
    assert_eq!(world.objects.manifest("one").await.unwrap().unwrap().description, b"old");

    let sent = world.objects.upload("one", b"new".to_vec(), vec![world.file("file", &new)]).await.unwrap();
    assert!(sent.chunks <= 8, "{sent:?}");
    assert_eq!(world.downloaded("one", "file").await.unwrap(), new);
}

#[tokio::test]
async fn a_store_out_of_reach_is_an_error_that_may_pass() {
    let mut world = World::s3().await;
    world.s3_mut().stop().await;
    let error = world.objects.upload("one", Vec::new(), vec![world.file("file", b"x")]).await.unwrap_err();
    assert!(matches!(error, objects::Error::Ask { .. }) && error.is_passing(), "{error:?}");
    world.s3_mut().restart().await;
    world.objects.upload("one", Vec::new(), vec![world.file("file", b"x")]).await.unwrap();
}

#[tokio::test]
async fn names_that_lead_elsewhere_are_refused() {
    let world = World::folder();
    for name in ["", "/", "a/", "../x", "a/../b", "a b", "ä"] {
        let error = world.objects.upload(name, Vec::new(), Vec::new()).await.unwrap_err();
        assert!(matches!(error, objects::Error::Name(_)), "{name:?}");
        assert!(matches!(world.objects.manifest(name).await, Err(objects::Error::Name(_))), "{name:?}");
    }
}
