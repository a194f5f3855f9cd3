//! What every host agent promises, as checks against one that listens. The fake passes them, and the real one must.
//!
//! What a fork and a template carry over of a guest's inside is not checked here: the fake has no such thing.
//!
//! Each check panics with what was broken, and leaves nothing on the host. A host that is given to [`all`] may have other
//! capsules; they are not looked at.

mod asleep;
mod copies;

use std::time::Duration;

use agent_api::*;
use api::CapsuleId;
use connectrpc::{ConnectError, ErrorCode};
use guest_api::process::__buffa::view::oneof::process_event::Event;
use guest_api::process::__buffa::view::oneof::process_event::data_event::Output;
use guest_api::process::{ListRequest, ProcessConfig, StartRequest};

/// How long a host may take for anything.
const PATIENCE: Duration = Duration::from_secs(180);

/// An agent under test. It has an object store.
pub struct Subject {
    pub endpoint: Endpoint,
    /// An image it has.
    pub image: String,
}

/// Every check, one after the other.
pub async fn all(subject: &Subject) {
    a_whole_life(subject).await;
    creating_twice_at_once_makes_one(subject).await;
    the_caller_may_leave(subject).await;
    a_destroy_ends_a_create(subject).await;
    what_is_not_there(subject).await;
    specifications_are_checked(subject).await;
    the_host_says_what_it_is(subject).await;
    what_is_used_is_told_to_whoever_asks(subject).await;
    what_a_host_cannot_hold(subject).await;
    asleep::all(subject).await;
    copies::all(subject).await;
}

impl Subject {
    fn lifecycle(&self) -> Lifecycle {
        Transport::new(self.endpoint.clone()).lifecycle()
    }

    fn spec(&self) -> CapsuleSpec {
        CapsuleSpec {
            id: CapsuleId::random().to_string(),
            image: self.image.clone(),
            vcpus: 1,
            memory_mib: 512,
            disk_mib: 5120,
            template_id: "00000000-0000-0000-0000-000000000000".into(),
            ..Default::default()
        }
    }

    async fn create(&self, spec: &CapsuleSpec) -> Result<Capsule, ConnectError> {
        let request = CreateCapsuleRequest { spec: spec.clone().into(), ..Default::default() };
        let answer = self.lifecycle().create_capsule(request).await?.into_owned();
        Ok(answer.capsule.into_option().expect("a create answers with the capsule"))
    }

    async fn destroy(&self, id: &str) {
        let request = DestroyCapsuleRequest { id: id.into(), ..Default::default() };
        self.lifecycle().destroy_capsule(request).await.expect("a destroy succeeds");
    }

    async fn touch(&self, id: &str) -> Result<(), ConnectError> {
        self.lifecycle().touch_capsule(TouchCapsuleRequest { id: id.into(), ..Default::default() }).await.map(|_| ())
    }

    /// The capsule as the host lists it.
    async fn listed(&self, id: &str) -> Option<Capsule> {
        let answer = self.lifecycle().list_capsules(ListCapsulesRequest::default()).await.expect("a list succeeds");
        let mut found: Vec<_> = answer.into_owned().capsules.into_iter().filter(|capsule| capsule.id == id).collect();
        assert!(found.len() <= 1, "{id} is listed {} times", found.len());
        found.pop()
    }

    /// Waits until the host lists the capsule in a state that `wanted` likes.
    async fn until(&self, id: &str, wanted: impl Fn(Option<CapsuleState>) -> bool) {
        let reached = async {
            while !wanted(self.listed(id).await.and_then(|capsule| capsule.state.as_known())) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, reached)
            .await
            .unwrap_or_else(|_| panic!("{id} does not come to the state that is waited for"));
    }

    /// That nothing of the capsule runs, whether or not the host still remembers it.
    async fn gone(&self, id: &str) {
        let state = self.listed(id).await.and_then(|capsule| capsule.state.as_known());
        assert!(ended(state), "{id} is {state:?}");
        assert_eq!(self.touch(id).await.expect_err("what is gone is not touched").code, ErrorCode::NotFound);
        let error = self.guest(id, "echo", &["x"]).await.expect_err("what is gone has no guest");
        assert!(matches!(error.code, ErrorCode::NotFound | ErrorCode::Unimplemented), "{error}");
    }

    /// Waits until the guest runs that command.
    async fn until_guest_has(&self, id: &str, cmd: &str) {
        let processes = Transport::new(self.endpoint.clone()).guest(id.parse().expect("an id"));
        let found = async {
            loop {
                let listed =
                    processes.list(ListRequest::default()).await.expect("a running capsule lists its processes");
                let listed = listed.into_owned().processes;
                if listed.iter().any(|process| process.config.as_option().is_some_and(|config| config.cmd == cmd)) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, found).await.expect("the guest runs what it was asked to run");
    }

    /// Runs a command in the guest; its standard output and exit code.
    async fn guest(&self, id: &str, cmd: &str, args: &[&str]) -> Result<(Vec<u8>, i32), ConnectError> {
        let processes = Transport::new(self.endpoint.clone()).guest(id.parse().expect("an id"));
        let args = args.iter().map(|arg| (*arg).into()).collect();
        let process = ProcessConfig { cmd: cmd.into(), args, ..Default::default() };
        let request = StartRequest { process: process.into(), stdin: Some(false), ..Default::default() };
        let mut stream = processes.start(request).await?;
        let (mut begun, mut stdout) = (false, Vec::new());
        while let Some(message) = stream.message().await? {
            match message.view().event.event.as_ref() {
                Some(Event::Start(start)) => begun = start.pid > 0,
                Some(Event::Data(data)) => {
                    if let Some(Output::Stdout(bytes)) = data.output {
                        stdout.extend_from_slice(bytes);
                    }
                }
                Some(Event::End(end)) => {
                    assert!(begun, "a process ends after it began");
                    return Ok((stdout, end.exit_code));
                }
                Some(Event::Keepalive(_)) | None => {}
            }
        }
        panic!("the stream ended without an end")
    }
}

fn ended(state: Option<CapsuleState>) -> bool {
    use CapsuleState::{CAPSULE_STATE_FAILED, CAPSULE_STATE_HIBERNATED, CAPSULE_STATE_STOPPED};
    matches!(state, None | Some(CAPSULE_STATE_STOPPED | CAPSULE_STATE_FAILED | CAPSULE_STATE_HIBERNATED))
}

/// Create, create again, list, touch, use, destroy, destroy again.
pub async fn a_whole_life(subject: &Subject) {
    let spec = subject.spec();
    let capsule = subject.create(&spec).await.expect("a create succeeds");
    assert_eq!((&capsule.id, capsule.state.as_known()), (&spec.id, Some(CapsuleState::CAPSULE_STATE_RUNNING)));
    assert_eq!(capsule.spec.as_option(), Some(&spec), "the spec is answered as it was given");
    assert!(capsule.generation > 0 && capsule.last_active_unix_ms > 0 && !capsule.host_ip.is_empty());
    for version in ["kernel_version", "vmm_version", "agent_version", "envd_version"] {
        assert!(capsule.versions.get(version).is_some_and(|text| !text.is_empty()), "{version} is missing");
    }

    let again = subject.create(&spec).await.expect("a second create succeeds");
    assert_eq!((again.state, again.generation), (capsule.state, capsule.generation), "a second create changes nothing");

    // Listing is repeatable, and says what the create said.
    for _ in 0..3 {
        let listed = subject.listed(&spec.id).await.expect("a running capsule is listed");
        assert_eq!(
            (listed.state, listed.generation, listed.spec.as_option()),
            (capsule.state, capsule.generation, Some(&spec))
        );
    }

    subject.touch(&spec.id).await.expect("a running capsule is touched");
    let touched = subject.listed(&spec.id).await.expect("it is still listed");
    assert!(touched.last_active_unix_ms >= capsule.last_active_unix_ms, "a touch does not go back in time");
    assert_eq!(touched.generation, capsule.generation, "a touch is not a change of state");

    // The clock has moved on by a millisecond before the guest is used.
    tokio::time::sleep(Duration::from_millis(2)).await;
    let (stdout, code) = subject.guest(&spec.id, "echo", &["hello", "guest"]).await.expect("a command runs");
    assert_eq!((stdout.as_slice(), code), (b"hello guest\n".as_slice(), 0));
    let used = subject.listed(&spec.id).await.expect("it is still listed");
    assert!(used.last_active_unix_ms > touched.last_active_unix_ms, "guest traffic is activity");

    subject.destroy(&spec.id).await;
    subject.gone(&spec.id).await;
    if let Some(remembered) = subject.listed(&spec.id).await {
        assert!(remembered.generation > capsule.generation, "an end is a change of state");
    }
    subject.destroy(&spec.id).await;
    subject.gone(&spec.id).await;
}

/// Two creates of one id, at the same time, are one capsule.
pub async fn creating_twice_at_once_makes_one(subject: &Subject) {
    let spec = subject.spec();
    let (one, two) = tokio::join!(subject.create(&spec), subject.create(&spec));
    let (one, two) = (one.expect("the first succeeds"), two.expect("the second succeeds"));
    assert_eq!((one.state, one.generation), (two.state, two.generation));
    assert_eq!(one.state.as_known(), Some(CapsuleState::CAPSULE_STATE_RUNNING));
    subject.destroy(&spec.id).await;
    subject.gone(&spec.id).await;
}

/// A create goes on when nobody waits for its answer.
pub async fn the_caller_may_leave(subject: &Subject) {
    let spec = subject.spec();
    tokio::select! {
        created = subject.create(&spec) => { created.expect("a create succeeds"); }
        () = subject.until(&spec.id, |state| state.is_some()) => {}
    }
    subject.until(&spec.id, |state| state == Some(CapsuleState::CAPSULE_STATE_RUNNING)).await;
    subject.destroy(&spec.id).await;
    subject.gone(&spec.id).await;
}

/// A destroy in the middle of a create leaves nothing, whichever of the two is faster.
pub async fn a_destroy_ends_a_create(subject: &Subject) {
    let spec = subject.spec();
    let destroy = async {
        subject.until(&spec.id, |state| state.is_some()).await;
        subject.destroy(&spec.id).await;
    };
    // The create may have won, or say that it was ended.
    let (_, ()) = tokio::join!(subject.create(&spec), destroy);
    subject.until(&spec.id, ended).await;
    subject.gone(&spec.id).await;
}

/// An id nobody has.
pub async fn what_is_not_there(subject: &Subject) {
    let id = CapsuleId::random();
    subject.destroy(&id.to_string()).await;
    subject.gone(&id.to_string()).await;
    let guest = Transport::new(subject.endpoint.clone()).guest(id);
    let error = guest.list(ListRequest::default()).await.expect_err("an unknown capsule has no processes");
    assert!(matches!(error.code, ErrorCode::NotFound | ErrorCode::Unimplemented), "{error}");
    assert_eq!(subject.listed(&id.to_string()).await, None, "asking makes nothing");
}

/// What cannot be made is refused with the reason's code, and leaves nothing.
pub async fn specifications_are_checked(subject: &Subject) {
    let good = subject.spec();
    for (spec, code) in [
        (CapsuleSpec { image: "no-such-image".into(), ..good.clone() }, ErrorCode::NotFound),
        (CapsuleSpec { image: "../minimal".into(), ..good.clone() }, ErrorCode::NotFound),
        (CapsuleSpec { vcpus: 0, ..good.clone() }, ErrorCode::InvalidArgument),
        (CapsuleSpec { memory_mib: 0, ..good.clone() }, ErrorCode::InvalidArgument),
        (CapsuleSpec { id: "cl-".into(), ..good.clone() }, ErrorCode::InvalidArgument),
        (CapsuleSpec { id: "../../etc".into(), ..good.clone() }, ErrorCode::InvalidArgument),
        (CapsuleSpec { id: String::new(), ..good.clone() }, ErrorCode::InvalidArgument),
    ] {
        let error = subject.create(&spec).await.expect_err("such a spec is refused");
        let code_fits = error.code == code
            || (code == ErrorCode::NotFound && error.code == ErrorCode::InvalidArgument && spec.image.contains('/'));
        assert!(code_fits, "{spec:?} gives {error}");
        let state = subject.listed(&spec.id).await.and_then(|capsule| capsule.state.as_known());
        assert!(ended(state), "{spec:?} left something that is {state:?}");
    }
}

/// The host's own description.
pub async fn the_host_says_what_it_is(subject: &Subject) {
    let host =
        subject.lifecycle().get_host(GetHostRequest::default()).await.expect("a host describes itself").into_owned();
    assert!(!host.agent_version.is_empty() && !host.vmm.is_empty() && host.cpus > 0 && host.memory_mib > 0);
    assert!(host.images.contains(&subject.image), "{:?}", host.images);
}

/// What a capsule uses, without a word to its guest.
pub async fn what_is_used_is_told_to_whoever_asks(subject: &Subject) {
    let spec = subject.spec();
    let ask = async || {
        let request = GetMetricsRequest { id: spec.id.clone(), seconds: 600, ..Default::default() };
        subject.lifecycle().get_metrics(request).await.map(|answer| answer.into_owned().points)
    };
    assert_eq!(ask().await.expect_err("nothing is known of what is not there").code, ErrorCode::NotFound);
    let capsule = subject.create(&spec).await.expect("a create succeeds");
    let points = ask().await.expect("a running capsule has metrics");
    let point = points.last().expect("the last point is of now");
    assert!(point.unix_ms > 1_700_000_000_000 && point.memory_bytes > 0 && point.disk_bytes > 0, "{point:?}");
    assert!(point.cpu_usec > 0 && point.sent_bytes > 0 && point.received_bytes > 0, "{point:?}");
    assert!(points.iter().all(|point| (0.0..=100.0).contains(&point.cpu_percent)), "{points:?}");
    assert!(points.is_sorted_by_key(|point| point.unix_ms), "{points:?}");
    let listed = subject.listed(&spec.id).await.expect("it is listed");
    assert_eq!(listed.last_active_unix_ms, capsule.last_active_unix_ms, "asking is no activity");
    subject.destroy(&spec.id).await;
    assert_eq!(ask().await.expect_err("nothing is known of what has ended").code, ErrorCode::NotFound);
}

/// More than any host has.
pub async fn what_a_host_cannot_hold(subject: &Subject) {
    let host = subject.lifecycle().get_host(GetHostRequest::default()).await.expect("it describes itself").into_owned();
    for room in [host.memory_promised_mib, host.vcpus_promised, host.disk_used_mib] {
        let room = room.into_option().expect("a host says what it has room for");
        assert!(room.limit > 0, "{room:?}");
    }
    let spec = CapsuleSpec { memory_mib: u32::MAX, ..subject.spec() };
    let error = subject.create(&spec).await.expect_err("no host has so much memory");
    assert_eq!(error.code, ErrorCode::ResourceExhausted, "{error}");
    let full = full::of(&error).expect("the error says of what there is not enough");
    assert!(
        ["memory", "disk"].contains(&&*full.resource) && full.used.saturating_add(full.asked) > full.limit,
        "{full:?}"
    );
    assert!(ended(subject.listed(&spec.id).await.and_then(|capsule| capsule.state.as_known())), "it left something");
}
