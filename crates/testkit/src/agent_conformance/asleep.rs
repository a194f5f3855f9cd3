//! Pausing and resuming.

use agent_api::*;
use api::CapsuleId;
use connectrpc::{ConnectError, ErrorCode};

use super::Subject;

pub(super) async fn all(subject: &Subject) {
    a_paused_capsule_waits(subject).await;
    many_who_ask_get_one_pause(subject).await;
    whoever_asks_may_leave(subject).await;
    a_paused_capsule_is_destroyed(subject).await;
    a_stream_ends_with_a_pause(subject).await;
    nobody_to_pause(subject).await;
    what_hibernates_is_not_here_and_comes_back(subject).await;
    nobody_to_hibernate(subject).await;
    what_it_may_reach_is_kept(subject).await;
}

impl Subject {
    pub(super) async fn pause(&self, id: &str) -> Result<Capsule, ConnectError> {
        let request = PauseCapsuleRequest { id: id.into(), ..Default::default() };
        let answer = self.lifecycle().pause_capsule(request).await?.into_owned();
        Ok(answer.capsule.into_option().expect("a pause answers with the capsule"))
    }

    pub(super) async fn resume(&self, id: &str) -> Result<Capsule, ConnectError> {
        let request = ResumeCapsuleRequest { id: id.into(), ..Default::default() };
        let answer = self.lifecycle().resume_capsule(request).await?.into_owned();
        Ok(answer.capsule.into_option().expect("a resume answers with the capsule"))
    }

    async fn adopt(&self, id: &str) -> Result<Capsule, ConnectError> {
        let request = ResumeCapsuleRequest { id: id.into(), adopt: true, ..Default::default() };
        let answer = self.lifecycle().resume_capsule(request).await?.into_owned();
        Ok(answer.capsule.into_option().expect("a resume answers with the capsule"))
    }

    async fn hibernate(&self, id: &str) -> Result<Capsule, ConnectError> {
        let request = HibernateCapsuleRequest { id: id.into(), ..Default::default() };
        let answer = self.lifecycle().hibernate_capsule(request).await?.into_owned();
        Ok(answer.capsule.into_option().expect("a hibernate answers with the capsule"))
    }

    /// Ends what the host and the object store have of a capsule.
    async fn forget(&self, id: &str) {
        let request = DestroyCapsuleRequest { id: id.into(), forget: true, ..Default::default() };
        self.lifecycle().destroy_capsule(request).await.expect("a destroy succeeds");
    }

    /// A capsule that runs.
    pub(super) async fn running(&self) -> Capsule {
        self.create(&self.spec()).await.expect("a create succeeds")
    }

    pub(super) async fn end(&self, id: &str) {
        self.destroy(id).await;
        self.gone(id).await;
    }
}

/// What runs and what is on disk outlast two pauses; meanwhile nothing of it can be used, and it is listed as paused.
async fn a_paused_capsule_waits(subject: &Subject) {
    let capsule = subject.running().await;
    let id = &capsule.id;
    let file = format!("/tmp/{id}");
    let begin = format!("echo kept > {file}; sleep 1000 >/dev/null 2>&1 & echo $! >> {file}");
    assert_eq!(subject.guest(id, "sh", &["-c", &begin]).await.expect("a command runs").1, 0);

    let mut generation = capsule.generation;
    for _ in 0..2 {
        let paused = subject.pause(id).await.expect("a running capsule is paused");
        assert_eq!((&paused.id, paused.state.as_known()), (id, Some(CapsuleState::CAPSULE_STATE_PAUSED)));
        assert!(paused.generation > generation, "a pause is a change of state");
        assert!(paused.reason.is_empty(), "it did not pause by itself");
        assert_eq!(paused.spec, capsule.spec, "it is still what it was made to be");
        let again = subject.pause(id).await.expect("a paused capsule is paused");
        assert_eq!(
            (again.state, again.generation),
            (paused.state, paused.generation),
            "a second pause changes nothing"
        );
        let created = subject.create(capsule.spec.as_option().expect("it has one")).await.expect("it is there");
        assert_eq!((created.state, created.generation), (paused.state, paused.generation), "a create resumes nothing");
        let listed = subject.listed(id).await.expect("a paused capsule is listed");
        assert_eq!((listed.state, listed.generation), (paused.state, paused.generation));
        let refused = subject.guest(id, "true", &[]).await.expect_err("what is paused has no guest");
        assert_eq!(refused.code, ErrorCode::FailedPrecondition, "it is said to be paused: {refused}");
        assert_eq!(subject.listed(id).await.expect("it is listed").state, paused.state, "use resumes nothing");

        let resumed = subject.resume(id).await.expect("a paused capsule is resumed");
        assert_eq!(resumed.state.as_known(), Some(CapsuleState::CAPSULE_STATE_RUNNING));
        assert!(resumed.generation > paused.generation && resumed.reason.is_empty());
        assert!(resumed.last_active_unix_ms >= paused.last_active_unix_ms, "activity does not go back in time");
        let again = subject.resume(id).await.expect("a running capsule is resumed");
        assert_eq!(
            (again.state, again.generation),
            (resumed.state, resumed.generation),
            "a second resume changes nothing"
        );
        generation = resumed.generation;

        let look = format!("head -n 1 {file}; kill -0 $(tail -n 1 {file}) && echo alive");
        let (stdout, code) = subject.guest(id, "sh", &["-c", &look]).await.expect("a resumed capsule is used");
        assert_eq!((String::from_utf8_lossy(&stdout).as_ref(), code), ("kept\nalive\n", 0));
    }
    subject.guest(id, "rm", &[&file]).await.expect("a command runs");
    subject.end(id).await;
}

/// Pauses at the same time are one pause, resumes one resume.
async fn many_who_ask_get_one_pause(subject: &Subject) {
    let id = subject.running().await.id;
    let (one, two, three) = tokio::join!(subject.pause(&id), subject.pause(&id), subject.pause(&id));
    let all = [one, two, three].map(|paused| paused.expect("each is told that it is paused"));
    assert!(all.iter().all(|paused| paused.generation == all[0].generation), "{all:?}");
    assert_eq!(all[0].state.as_known(), Some(CapsuleState::CAPSULE_STATE_PAUSED));
    let (one, two) = tokio::join!(subject.resume(&id), subject.resume(&id));
    let (one, two) = (one.expect("the first succeeds"), two.expect("the second succeeds"));
    assert_eq!((one.state, one.generation), (two.state, two.generation));
    subject.end(&id).await;
}

/// A pause and a resume go on when nobody waits for their answers.
async fn whoever_asks_may_leave(subject: &Subject) {
    let id = subject.running().await.id;
    let beyond = |state| move |now: Option<CapsuleState>| now.is_some_and(|now| now != state);
    tokio::select! {
        paused = subject.pause(&id) => { paused.expect("a pause succeeds"); }
        () = subject.until(&id, beyond(CapsuleState::CAPSULE_STATE_RUNNING)) => {}
    }
    subject.until(&id, |state| state == Some(CapsuleState::CAPSULE_STATE_PAUSED)).await;
    tokio::select! {
        resumed = subject.resume(&id) => { resumed.expect("a resume succeeds"); }
        () = subject.until(&id, beyond(CapsuleState::CAPSULE_STATE_PAUSED)) => {}
    }
    subject.until(&id, |state| state == Some(CapsuleState::CAPSULE_STATE_RUNNING)).await;
    subject.end(&id).await;
}

async fn a_paused_capsule_is_destroyed(subject: &Subject) {
    let id = subject.running().await.id;
    subject.pause(&id).await.expect("a running capsule is paused");
    subject.end(&id).await;
    let error = subject.resume(&id).await.expect_err("nothing is left to resume");
    assert_eq!(error.code, ErrorCode::NotFound, "{error}");
}

/// Who follows a process is not left hanging.
async fn a_stream_ends_with_a_pause(subject: &Subject) {
    let id = subject.running().await.id;
    let follow = subject.guest(&id, "sleep", &["1000"]);
    let pause = async {
        subject.until_guest_has(&id, "sleep").await;
        subject.pause(&id).await.expect("a capsule that is used is paused");
    };
    let (followed, ()) = tokio::time::timeout(super::PATIENCE, async { tokio::join!(follow, pause) })
        .await
        .expect("the stream ends with the pause");
    assert!(followed.is_err(), "the process has not ended");
    subject.end(&id).await;
}

/// What hibernates holds nothing here, and goes on where it was when it is adopted; a destroy ends that only if it is told to.
async fn what_hibernates_is_not_here_and_comes_back(subject: &Subject) {
    let capsule = subject.running().await;
    let id = &capsule.id;
    let error = subject.hibernate(id).await.expect_err("it runs");
    assert_eq!(error.code, ErrorCode::FailedPrecondition, "{error}");
    let (pid, code) = subject.guest(id, "sh", &["-c", "sleep 1000 >/dev/null 2>&1 & echo $!"]).await.expect("it runs");
    assert_eq!(code, 0);
    let alive = format!("kill -0 {} && echo alive", String::from_utf8_lossy(&pid).trim_end());
    let paused = subject.pause(id).await.expect("a running capsule is paused");
    let hibernated = subject.hibernate(id).await.expect("a paused capsule hibernates");
    assert_eq!(hibernated.state.as_known(), Some(CapsuleState::CAPSULE_STATE_HIBERNATED));
    assert!(hibernated.generation > paused.generation && !hibernated.uploaded);
    subject.gone(id).await;
    let error = subject.resume(id).await.expect_err("it is not here");
    assert_eq!(error.code, ErrorCode::NotFound, "{error}");
    subject.destroy(id).await;

    let adopted = subject.adopt(id).await.expect("what hibernates is adopted");
    assert_eq!((adopted.state.as_known(), adopted.spec), (Some(CapsuleState::CAPSULE_STATE_RUNNING), capsule.spec));
    let again = subject.adopt(id).await.expect("what runs is not adopted again");
    assert_eq!(again.generation, adopted.generation);
    let (stdout, _) = subject.guest(id, "sh", &["-c", &alive]).await.expect("it runs");
    assert_eq!(String::from_utf8_lossy(&stdout), "alive\n");
    subject.forget(id).await;
    subject.gone(id).await;
    let error = subject.adopt(id).await.expect_err("it was forgotten");
    assert_eq!(error.code, ErrorCode::NotFound, "{error}");
}

async fn nobody_to_hibernate(subject: &Subject) {
    let id = CapsuleId::random().to_string();
    assert_eq!(subject.hibernate(&id).await.expect_err("nobody has it").code, ErrorCode::NotFound);
    assert_eq!(subject.adopt(&id).await.expect_err("nobody has it").code, ErrorCode::NotFound);
    subject.forget(&id).await;
}

async fn nobody_to_pause(subject: &Subject) {
    let id = CapsuleId::random().to_string();
    assert_eq!(subject.pause(&id).await.expect_err("nobody has it").code, ErrorCode::NotFound);
    assert_eq!(subject.resume(&id).await.expect_err("nobody has it").code, ErrorCode::NotFound);
    let id = subject.running().await.id;
    subject.end(&id).await;
    assert_eq!(subject.pause(&id).await.expect_err("it has ended").code, ErrorCode::NotFound);
    assert_eq!(subject.resume(&id).await.expect_err("it has ended").code, ErrorCode::NotFound);
}

/// What a capsule may reach is what was said last, whatever becomes of it.
async fn what_it_may_reach_is_kept(subject: &Subject) {
    let list = |entries: &[&str]| entries.iter().map(ToString::to_string).collect();
    let everything = "0.0.0.0/0";
    let off = Egress { deny: list(&[everything]), ..Default::default() };
    let named = Egress { domains: list(&["*.example.com"]), allow: list(&["192.0.2.0/24"]), ..off.clone() };
    let set = async |id: &str, egress: &Egress| {
        let request = SetEgressRequest { id: id.into(), egress: egress.clone().into(), ..Default::default() };
        subject.lifecycle().set_egress(request).await.map(drop)
    };
    let reported = async |id: &str| {
        let spec = subject.listed(id).await.and_then(|capsule| capsule.spec.into_option());
        spec.expect("it is listed").egress.into_option().unwrap_or_default()
    };

    let spec = CapsuleSpec { egress: off.clone().into(), ..subject.spec() };
    let capsule = subject.create(&spec).await.expect("a create succeeds");
    let id = spec.id.as_str();
    assert_eq!(capsule.spec.as_option(), Some(&spec));
    for egress in [&named, &named, &Egress::default(), &off] {
        set(id, egress).await.expect("a running capsule's limits are changed");
        assert_eq!(reported(id).await, *egress);
    }
    for wrong in [
        Egress { deny: list(&["::/0"]), ..Default::default() },
        Egress { domains: list(&["example.com"]), ..Default::default() },
        Egress { domains: list(&["a\0b.example"]), ..off.clone() },
    ] {
        assert_eq!(set(id, &wrong).await.expect_err("it is none").code, ErrorCode::InvalidArgument);
    }
    assert_eq!(reported(id).await, off);

    let child = CapsuleId::random().to_string();
    let request = ForkCapsuleRequest { id: id.into(), children: vec![child.clone()], ..Default::default() };
    subject.lifecycle().fork_capsule(request).await.expect("a fork succeeds");
    assert_eq!(reported(&child).await, off, "a fork has its parent's");
    subject.end(&child).await;

    subject.pause(id).await.expect("a pause succeeds");
    assert_eq!(reported(id).await, off);
    set(id, &named).await.expect("a paused capsule's limits are changed");
    subject.resume(id).await.expect("a resume succeeds");
    assert_eq!(reported(id).await, named);
    subject.pause(id).await.expect("a pause succeeds");
    let request = ResumeCapsuleRequest { id: id.into(), egress: off.clone().into(), ..Default::default() };
    subject.lifecycle().resume_capsule(request).await.expect("a resume succeeds");
    assert_eq!(reported(id).await, off);
    subject.end(id).await;
    assert_eq!(set(id, &off).await.expect_err("it has ended").code, ErrorCode::NotFound);
}
