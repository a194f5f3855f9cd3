use std::fs;

use objects::{Error, ManifestError, Unreadable};

use crate::world::{World, content};

#[tokio::test]
async fn a_damaged_chunk_is_never_taken_for_what_it_was() {
    for world in World::both().await {
        world.objects.upload("other", Vec::new(), vec![world.file("other", &content(9, 1, 0))]).await.unwrap();
        let foreign = fs::read(&world.chunks()[0]).unwrap();
        fs::remove_file(&world.chunks()[0]).unwrap();
        world.objects.upload("one", Vec::new(), vec![world.file("file", &content(1, 1, 0))]).await.unwrap();
        let path = world.chunks()[0].clone();
        let good = fs::read(&path).unwrap();
        let why = async |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            match world.downloaded("one", "file").await.unwrap_err() {
                error @ Error::Damaged { .. } => {
                    assert!(!error.is_passing());
                    let Error::Damaged { why, .. } = error else { unreachable!() };
                    why
                }
                other => panic!("{other:?}"),
            }
        };
        assert!(matches!(why(&[]).await, Unreadable::Hash));
        assert!(matches!(why(&good[..good.len() / 2]).await, Unreadable::Decompress(_)));
        assert!(matches!(why(b"something else").await, Unreadable::Decompress(_)));
        assert!(matches!(why(&foreign).await, Unreadable::Hash));
        assert!(matches!(why(&vec![0; 2 << 20]).await, Unreadable::TooLong(_)));
        for at in [0, 10, good.len() / 2, good.len() - 1] {
            let mut flipped = good.clone();
            flipped[at] ^= 0x10;
            // Some bits of the compressed form mean nothing; then the content is what it was.
            fs::write(&path, &flipped).unwrap();
            match world.downloaded("one", "file").await {
                Ok(bytes) => assert_eq!(bytes, content(1, 1, 0)),
                Err(Error::Damaged { .. }) => {}
                Err(other) => panic!("{other:?}"),
            }
        }
        fs::remove_file(&path).unwrap();
        assert!(matches!(world.downloaded("one", "file").await, Err(Error::Missing(_))));
        assert_eq!(world.objects.audit().await.unwrap().missing.len(), 2);
    }
}

#[tokio::test]
async fn a_damaged_manifest_is_an_error_of_its_own() {
    for world in World::both().await {
        world.objects.upload("one", b"what".to_vec(), vec![world.file("file", &content(1, 1, 0))]).await.unwrap();
        let path = world.folder.join("manifests/one");
        let good = fs::read(&path).unwrap();
        let why = async |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            match world.objects.manifest("one").await {
                Err(Error::Manifest { name, source }) => {
                    assert_eq!(name, "one");
                    source
                }
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(why(&[]).await, ManifestError::Empty);
        assert_eq!(why(&good[..40]).await, ManifestError::Truncated(40));
        assert_eq!(why(&[b'x'; 200]).await, ManifestError::Foreign);
        let changed = |at: usize| {
            let mut bytes = good.clone();
            bytes[at] ^= 2;
            bytes
        };
        assert_eq!(why(&changed(8)).await, ManifestError::Version(3));
        assert_eq!(why(&changed(30)).await, ManifestError::Checksum);
        // One that is of no use is replaced by the next upload.
        world.objects.upload("one", Vec::new(), vec![world.file("file", &content(1, 1, 0))]).await.unwrap();
        assert_eq!(world.downloaded("one", "file").await.unwrap(), content(1, 1, 0));
    }
}
