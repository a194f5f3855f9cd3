//! How a fake capsule moves through its life. One thing at a time, but for its end.

use std::collections::HashSet;
use std::sync::Arc;

use agent_api::*;
use api::CapsuleId;
use connectrpc::{ConnectError, ErrorCode};
use tokio::sync::OwnedMutexGuard;

use super::guest::Guest;
use super::service::now_ms;
use super::{Entry, IMAGE, Inner, MEMORY_MIB};

/// The specification as it will be carried out: with the sizes of the template, if it is one.
pub fn check(inner: &Inner, mut spec: CapsuleSpec) -> Result<CapsuleSpec, ConnectError> {
    if let Some(template) = inner.templates.lock().expect("no panics under this lock").get(&spec.image) {
        let sizes = [
            (&mut spec.vcpus, template.vcpus),
            (&mut spec.memory_mib, template.memory_mib),
            (&mut spec.disk_mib, template.disk_mib),
        ];
        for (asked, baked) in sizes {
            if *asked != 0 && *asked != baked {
                return Err(ConnectError::invalid_argument("the template has another size"));
            }
            *asked = baked;
        }
    } else if spec.image != IMAGE {
        return Err(ConnectError::not_found(format!("this host has no image {}", spec.image)));
    }
    if spec.id.parse::<CapsuleId>().is_err() || spec.vcpus == 0 || spec.memory_mib == 0 {
        return Err(ConnectError::invalid_argument("the specification is not one"));
    }
    Ok(spec)
}

/// Makes the capsule run if it is not there yet.
pub async fn create(inner: &Arc<Inner>, spec: CapsuleSpec) -> Result<Capsule, ConnectError> {
    let id = spec.id.clone();
    if !inner.capsules().contains_key(&id) && (inner.is_full() || spec.memory_mib > MEMORY_MIB) {
        return Err(full());
    }
    inner.capsules().entry(id.clone()).or_insert_with(|| Entry::starting(spec));
    let _turn = turn(inner, &id).await?;
    if inner.state(&id) == Some(CapsuleState::CAPSULE_STATE_STARTING) {
        inner.opened().await;
    }
    inner.begin(&id);
    let capsules = inner.capsules();
    match capsules.get(&id).map(|entry| &entry.capsule) {
        Some(capsule) if !ended(capsule) => Ok(capsule.clone()),
        Some(_) | None => Err(ConnectError::internal("the capsule was ended while it started")),
    }
}

/// Puts the capsule aside; by itself if there is a reason.
pub async fn pause(inner: &Arc<Inner>, id: &str, reason: &str) -> Result<Capsule, ConnectError> {
    let _turn = turn(inner, id).await?;
    let guest = match inner.state(id) {
        Some(CapsuleState::CAPSULE_STATE_RUNNING) => inner.fails().and_then(|()| inner.guest(id))?,
        Some(CapsuleState::CAPSULE_STATE_PAUSED) => return inner.get(id),
        _ => return Err(absent(id)),
    };
    inner.change(id, CapsuleState::CAPSULE_STATE_PAUSING, "");
    inner.opened().await;
    if inner.state(id) == Some(CapsuleState::CAPSULE_STATE_PAUSING) {
        guest.stop();
        inner.change(id, CapsuleState::CAPSULE_STATE_PAUSED, reason);
    }
    inner.get(id)
}

/// Lets the capsule go on.
pub async fn resume(inner: &Arc<Inner>, id: &str) -> Result<Capsule, ConnectError> {
    let _turn = turn(inner, id).await?;
    let guest = match inner.state(id) {
        Some(CapsuleState::CAPSULE_STATE_PAUSED) => inner.fails().and_then(|()| inner.guest(id))?,
        Some(CapsuleState::CAPSULE_STATE_RUNNING) => return inner.get(id),
        _ => return Err(absent(id)),
    };
    if inner.is_full() {
        return Err(full());
    }
    inner.change(id, CapsuleState::CAPSULE_STATE_RESUMING, "");
    inner.opened().await;
    if inner.state(id) == Some(CapsuleState::CAPSULE_STATE_RESUMING) {
        guest.go_on();
        inner.change(id, CapsuleState::CAPSULE_STATE_RUNNING, "");
    }
    inner.get(id)
}

/// Writes down what the capsule may reach.
pub fn set_egress(inner: &Inner, id: &str, egress: Egress) -> Result<(), ConnectError> {
    inner.fails()?;
    let policy = api::egress::Policy::try_from(egress)
        .map_err(|error: agent_api::egress::Error| ConnectError::invalid_argument(error.to_string()))?;
    let mut capsules = inner.capsules();
    let entry = capsules.get_mut(id).filter(|entry| !ended(&entry.capsule)).ok_or_else(|| absent(id))?;
    let mut spec = entry.capsule.spec.clone().into_option().unwrap_or_default();
    spec.egress = (!policy.is_open()).then(|| Egress::from(&policy)).into();
    entry.capsule.spec = spec.into();
    Ok(())
}

/// Moves a paused capsule to the object store.
pub async fn hibernate(inner: &Arc<Inner>, id: &str) -> Result<Capsule, ConnectError> {
    let _turn = turn(inner, id).await?;
    match inner.state(id) {
        Some(CapsuleState::CAPSULE_STATE_PAUSED) => inner.fails()?,
        Some(CapsuleState::CAPSULE_STATE_RUNNING) => {
            return Err(ConnectError::failed_precondition("the capsule is not paused"));
        }
        _ => return Err(absent(id)),
    }
    upload(inner, id);
    inner.change(id, CapsuleState::CAPSULE_STATE_HIBERNATED, "");
    inner.get(id)
}

/// Puts what is paused into the object store.
pub fn upload(inner: &Inner, id: &str) {
    let mut capsules = inner.capsules();
    let Some(Entry { capsule, guest, .. }) = capsules.get_mut(id) else { return };
    let stored = Entry { guest: guest.clone(), ..Entry::new(capsule.clone()) };
    inner.stored.lock().expect("no panics under this lock").insert(id.to_owned(), stored);
    capsule.uploaded = true;
    capsule.generation += 1;
}

/// Makes a capsule that is not here one that is paused here, if the object store has it. Who has resumed it elsewhere has
/// let it go on there; the fake has but one of it.
pub fn adopt(inner: &Arc<Inner>, id: &str) {
    if inner.get(id).is_ok_and(|capsule| !ended(&capsule)) {
        return;
    }
    let stored = inner.stored.lock().expect("no panics under this lock");
    if let Some(Entry { capsule, guest, .. }) = stored.get(id) {
        let mut entry = Entry { guest: guest.clone(), ..Entry::new(capsule.clone()) };
        entry.capsule.generation = inner.get(id).map_or(capsule.generation, |now| now.generation) + 1;
        inner.capsules().insert(id.to_owned(), entry);
    }
}

/// Makes children of the capsule's specification.
pub async fn fork(inner: &Arc<Inner>, id: &str, children: Vec<String>) -> Result<Vec<Child>, ConnectError> {
    let distinct: HashSet<&String> = children.iter().filter(|child| child.parse::<CapsuleId>().is_ok()).collect();
    if distinct.len() != children.len() || !(1..=100).contains(&children.len()) {
        return Err(ConnectError::invalid_argument("children are 1 to 100 different ids"));
    }
    let parent = running(inner, id).await?;
    let new = children.iter().filter(|child| !inner.capsules().contains_key(*child)).count();
    if inner.room_left() < new {
        return Err(full());
    }
    let failing = std::mem::take(&mut *inner.failing_children.lock().expect("no panics under this lock"));
    let first_to_fail = children.len().saturating_sub(failing);
    let make = |(number, id): (usize, String)| {
        let spec = CapsuleSpec { id: id.clone(), ..parent.spec.clone().into_option().unwrap_or_default() };
        if !inner.capsules().contains_key(&id) {
            if number >= first_to_fail {
                return Child { id, reason: "this host was told to fail".into(), ..Default::default() };
            }
            inner.capsules().insert(id.clone(), Entry::starting(spec));
            inner.begin(&id);
        }
        let capsule = inner.capsules().get(&id).map(|entry| entry.capsule.clone());
        Child { id, capsule: capsule.into(), ..Default::default() }
    };
    Ok(children.into_iter().enumerate().map(make).collect())
}

/// Keeps the capsule's sizes under a name.
pub async fn snapshot(inner: &Arc<Inner>, id: &str, name: String) -> Result<Template, ConnectError> {
    let begins = name.starts_with(|first: char| first.is_ascii_lowercase() || first.is_ascii_digit());
    let rest = name.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-'));
    if !begins || !rest || name.len() > 64 {
        return Err(ConnectError::invalid_argument("the name is not one"));
    }
    if name == IMAGE || inner.templates.lock().expect("no panics under this lock").contains_key(&name) {
        return Err(ConnectError::new(ErrorCode::AlreadyExists, "there is one of that name"));
    }
    let spec = running(inner, id).await?.spec.into_option().unwrap_or_default();
    let template = Template {
        name: name.clone(),
        vcpus: spec.vcpus,
        memory_mib: spec.memory_mib,
        disk_mib: spec.disk_mib,
        created_unix_ms: now_ms(),
        size_bytes: 4096,
        ..Default::default()
    };
    inner.templates.lock().expect("no panics under this lock").insert(name, template.clone());
    Ok(template)
}

/// The capsule, which runs.
async fn running(inner: &Arc<Inner>, id: &str) -> Result<Capsule, ConnectError> {
    let _turn = turn(inner, id).await?;
    let capsule = inner.get(id)?;
    if ended(&capsule) {
        return Err(absent(id));
    }
    if capsule.state != CapsuleState::CAPSULE_STATE_RUNNING {
        return Err(ConnectError::new(ErrorCode::FailedPrecondition, "the capsule does not run"));
    }
    inner.fails()?;
    Ok(capsule)
}

/// Waits until nothing else moves the capsule.
async fn turn(inner: &Inner, id: &str) -> Result<OwnedMutexGuard<()>, ConnectError> {
    let turn = inner.capsules().get(id).map(|entry| entry.turn.clone());
    Ok(turn.ok_or_else(|| absent(id))?.lock_owned().await)
}

pub fn ended(capsule: &Capsule) -> bool {
    matches!(
        capsule.state.as_known(),
        None | Some(
            CapsuleState::CAPSULE_STATE_STOPPED
                | CapsuleState::CAPSULE_STATE_FAILED
                | CapsuleState::CAPSULE_STATE_HIBERNATED
        )
    )
}

fn absent(id: &str) -> ConnectError {
    ConnectError::not_found(format!("no capsule {id} is here"))
}

fn full() -> ConnectError {
    let (resource, asked, used, limit) = ("memory".into(), 512, 1024, 1024);
    let full = HostFull { resource, asked, used, limit, ..Default::default() };
    agent_api::full::error(&full, "not enough memory left: 512 asked, 1024 of 1024 in use (MiB)".into())
}

/// What the host saw of a capsule: always the same, once since it runs.
pub fn metrics(capsule: &Capsule) -> Vec<MetricsPoint> {
    let point = MetricsPoint {
        unix_ms: now_ms(),
        cpu_percent: 12.5,
        memory_bytes: 64 << 20,
        disk_bytes: 1 << 20,
        sent_bytes: 1000,
        received_bytes: 2000,
        cpu_usec: 500_000,
        ..Default::default()
    };
    if capsule.state == CapsuleState::CAPSULE_STATE_RUNNING { vec![point] } else { Vec::new() }
}

impl Entry {
    fn starting(spec: CapsuleSpec) -> Self {
        Self::new(Capsule {
            id: spec.id.clone(),
            state: CapsuleState::CAPSULE_STATE_STARTING.into(),
            generation: 1,
            spec: spec.into(),
            host_ip: "10.11.0.1".into(),
            ..Default::default()
        })
    }
}

impl Inner {
    /// What is starting runs.
    fn begin(&self, id: &str) {
        if let Some(Entry { capsule, .. }) = self.capsules().get_mut(id)
            && capsule.state == CapsuleState::CAPSULE_STATE_STARTING
        {
            capsule.state = CapsuleState::CAPSULE_STATE_RUNNING.into();
            capsule.generation += 1;
            capsule.last_active_unix_ms = now_ms();
            let versions = ["kernel_version", "vmm_version", "agent_version", "envd_version"];
            capsule.versions = versions.map(|name| (name.into(), "fake".into())).into_iter().collect();
        }
    }

    async fn opened(&self) {
        // The sender is in `self`.
        let _ = self.open.subscribe().wait_for(|open| *open).await;
    }

    fn fails(&self) -> Result<(), ConnectError> {
        match *self.change_failure.lock().expect("no panics under this lock") {
            Some(code) => Err(ConnectError::new(code, "this host was told to fail")),
            None => Ok(()),
        }
    }

    fn is_full(&self) -> bool {
        self.room_left() == 0
    }

    /// How many more capsules may run.
    fn room_left(&self) -> usize {
        let waits = |capsule: &Capsule| ended(capsule) || capsule.state == CapsuleState::CAPSULE_STATE_PAUSED;
        let running = self.capsules().values().filter(|entry| !waits(&entry.capsule)).count();
        self.room.lock().expect("no panics under this lock").saturating_sub(running)
    }

    fn state(&self, id: &str) -> Option<CapsuleState> {
        self.capsules().get(id).and_then(|entry| entry.capsule.state.as_known())
    }

    fn get(&self, id: &str) -> Result<Capsule, ConnectError> {
        self.capsules().get(id).map(|entry| entry.capsule.clone()).ok_or_else(|| absent(id))
    }

    fn guest(&self, id: &str) -> Result<Arc<Guest>, ConnectError> {
        self.capsules().get(id).and_then(|entry| entry.guest.clone()).ok_or_else(|| absent(id))
    }
}
