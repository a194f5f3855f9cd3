use objects::Error;
use testkit::Fault;

use crate::world::{World, content};

#[tokio::test]
async fn a_server_that_is_busy_or_breaks_off_is_asked_again() {
    let world = World::s3().await;
    let s3 = world.s3.as_ref().unwrap();
    s3.fail(Fault::Status(503), 2);
    world.objects.upload("one", Vec::new(), vec![world.file("file", &content(1, 4, 77))]).await.unwrap();
    for fault in [Fault::Status(503), Fault::Status(500), Fault::Cut] {
        s3.fail(fault, 2);
        assert_eq!(world.downloaded("one", "file").await.unwrap(), content(1, 4, 77), "{fault:?}");
    }
    assert!(world.objects.audit().await.unwrap().missing.is_empty());
}

#[tokio::test]
async fn a_server_that_refuses_is_told_and_nothing_is_taken_for_lost() {
    let mut world = World::s3().await;
    world.objects.upload("one", Vec::new(), vec![world.file("file", &content(1, 1, 0))]).await.unwrap();
    let is_told = |error: Error| {
        assert!(matches!(error, Error::Ask { .. }) && error.is_passing(), "{error:?}");
    };
    world.s3_mut().fail(Fault::Status(403), u64::MAX);
    let again = world.objects.upload("two", Vec::new(), vec![world.file("file", &content(2, 1, 0))]).await;
    is_told(again.unwrap_err());
    is_told(world.objects.manifest("one").await.unwrap_err());
    world.s3_mut().fail(Fault::Status(403), 0);
    assert_eq!(world.downloaded("one", "file").await.unwrap(), content(1, 1, 0));

    // The bucket is not there, as when the address is wrong: that says nothing of what is in the right one.
    let manifest = world.objects.manifest("one").await.unwrap().unwrap();
    world.s3_mut().fail(Fault::NoBucket, u64::MAX);
    is_told(world.objects.manifest("one").await.unwrap_err());
    let file = tempfile::tempfile_in(world.dir.path()).unwrap();
    is_told(world.objects.download(manifest.file("file").unwrap(), file).await.unwrap_err());
}
