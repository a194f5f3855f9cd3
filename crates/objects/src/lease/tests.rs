use super::*;
use crate::Config;

const HOUR: Duration = Duration::from_secs(3600);

/// A lease, and the folder that it is in.
async fn lease() -> (Lease, tempfile::TempDir) {
    let dir = tempfile::TempDir::with_prefix("objects-test-").unwrap();
    let config = Config::parse(&format!("file://{}", dir.path().display()), []).unwrap();
    let lease = Lease::take(&Objects::open(&config).unwrap(), Work::Upload, Duration::ZERO).await;
    (lease.unwrap(), dir)
}

async fn is_lapsed(mut lease: Lease) -> bool {
    match lease.during(async { Ok(()) }).await {
        Err(Error::Lapsed) => true,
        done => done.map(|()| false).unwrap(),
    }
}

#[tokio::test]
async fn what_is_renewed_in_time_does_not_lapse() {
    let (mut lease, _dir) = lease().await;
    lease.renewed -= RENEW;
    lease.written.as_mut().unwrap().last_modified -= RENEW;
    let renewed = lease.renewed;
    lease.during(async { Ok(()) }).await.unwrap();
    assert!(lease.renewed > renewed);
    assert!(!is_lapsed(lease).await);
}

#[tokio::test]
async fn a_process_that_stood_still_does_not_renew_what_lapsed() {
    let (mut lease, _dir) = lease().await;
    lease.renewed -= HOUR;
    // It has more to do than renewing takes.
    let work = async {
        tokio::time::sleep(LOOK).await;
        Ok(())
    };
    let done = lease.during(work).await;
    assert!(matches!(done, Err(Error::Lapsed)), "{done:?}");
}

#[tokio::test]
async fn a_machine_that_stood_still_is_told_by_the_clock_of_the_store() {
    let (mut lease, _dir) = self::lease().await;
    lease.written.as_mut().unwrap().last_modified -= HOUR;
    assert!(matches!(lease.check_at(&lease.meta().await.unwrap()), Err(Error::Lapsed)));
    assert!(is_lapsed(lease).await);
}

#[tokio::test]
async fn what_another_has_removed_is_not_written_again() {
    let (lease, _dir) = lease().await;
    lease.objects.delete(&lease.path).await.unwrap();
    assert!(is_lapsed(lease).await);
}

#[tokio::test]
async fn one_that_is_broken_off_while_it_is_taken_is_given_back() {
    let dir = tempfile::TempDir::with_prefix("objects-test-").unwrap();
    let config = Config::parse(&format!("file://{}", dir.path().display()), []).unwrap();
    let objects = Objects::open(&config).unwrap();
    // As far as each of its first steps.
    for micros in (0..6_000).step_by(20) {
        let take = Lease::take(&objects, Work::Upload, Duration::ZERO);
        let _ = tokio::time::timeout(Duration::from_micros(micros), take).await;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let uploads = dir.path().join(Work::Upload.directory());
    let gone = async {
        while std::fs::read_dir(&uploads).unwrap().next().is_some() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), gone).await.expect("each is removed after it was written");
}
