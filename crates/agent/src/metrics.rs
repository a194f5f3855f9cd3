//! What capsules use of this host: one loop looks at all of them, and what it saw is kept for a day.
//!
//! ```text
//!   /proc/PID/smaps_rollup, cpu.stat ─┐
//!   extents of the capsule's files ───┼─► Reading ─► History ─► GetMetrics, GET /metrics
//!   counters of its slot ─────────────┘
//! ```
//!
//! No guest is asked: a guest may lie, and asking it would wake it. What is kept is lost with the agent. To look at a capsule
//! takes some milliseconds of a processor, as the pages of its memory are counted, so the loop is paced by what it takes.

mod history;
mod read;
mod text;

use std::collections::{HashMap, HashSet};
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use agent_api::{CapsuleState, MetricsPoint};
use api::CapsuleId;
use network::Traffic;
use tracing::warn;

use crate::Agent;
use crate::capsule::Handle;
use crate::host::{Host, blocking};
use history::History;
use read::Reading;

/// No capsule is looked at more often.
const PERIOD: Duration = Duration::from_secs(1);
/// The loop rests for so many times what a round took: it never takes more than a fiftieth of a processor.
const REST: u32 = 50;

/// What was seen of every capsule.
#[derive(Debug, Default)]
pub struct Metrics {
    histories: Mutex<HashMap<CapsuleId, History>>,
}

impl Metrics {
    fn lock(&self) -> MutexGuard<'_, HashMap<CapsuleId, History>> {
        self.histories.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Agent {
    /// Looks at every capsule again and again, until `shutdown`.
    pub async fn watch_capsules(self, shutdown: impl Future<Output = ()>) {
        tokio::pin!(shutdown);
        let mut pause = PERIOD;
        loop {
            tokio::select! {
                () = &mut shutdown => return,
                () = tokio::time::sleep(pause) => {}
            }
            let begun = Instant::now();
            self.look(self.list()).await;
            pause = PERIOD.max(begun.elapsed() * REST);
        }
    }

    /// What was seen of the capsule in the last `seconds`, and what it uses now.
    pub(crate) async fn metrics(&self, handle: &Handle, seconds: u32) -> Vec<MetricsPoint> {
        let now = read::now_ms();
        let latest = self.metrics.lock().get(&handle.spec.id).and_then(History::latest).map(|reading| reading.unix_ms);
        if latest.is_none_or(|latest| now - latest >= PERIOD.as_millis() as i64) {
            self.look(vec![handle.clone()]).await;
        }
        let histories = self.metrics.lock();
        let history = histories.get(&handle.spec.id);
        history.map_or_else(Vec::new, |history| history.points(read::now_ms(), seconds, handle.spec.vcpus))
    }

    /// What Prometheus reads: the host, and the last look at each capsule.
    pub(crate) fn metrics_text(&self) -> String {
        let latest: Vec<(CapsuleId, Reading)> = {
            let histories = self.metrics.lock();
            let running = self.list().into_iter().filter(is_running).map(|handle| handle.spec.id);
            running.filter_map(|id| Some((id, histories.get(&id)?.latest()?))).collect()
        };
        let states: Vec<CapsuleState> = self.list().iter().map(|handle| handle.observed().state).collect();
        text::write(&self.host.admission.room(), &states, &latest)
    }

    /// Looks at those of the capsules that run, and forgets those of all that are not there any more.
    async fn look(&self, handles: Vec<Handle>) {
        let running: Vec<_> = handles.into_iter().filter(is_running).collect();
        let (host, seen) = (self.host.clone(), running.iter().map(|handle| (handle.spec.id, place(handle))).collect());
        let readings = blocking(move || read_all(&host, seen)).await;
        let living: HashSet<CapsuleId> =
            self.list().iter().filter(|handle| !handle.observed().has_ended()).map(|handle| handle.spec.id).collect();
        let mut histories = self.metrics.lock();
        histories.retain(|id, _| living.contains(id));
        for (id, reading) in readings.into_iter().filter(|(id, _)| living.contains(id)) {
            histories.entry(id).or_default().push(reading);
        }
    }
}

fn is_running(handle: &Handle) -> bool {
    handle.observed().state == CapsuleState::Running
}

/// Where the host reaches the guest, which is what its slot is known by.
fn place(handle: &Handle) -> Option<Ipv4Addr> {
    handle.observed().host_ip
}

fn read_all(host: &Arc<Host>, capsules: Vec<(CapsuleId, Option<Ipv4Addr>)>) -> Vec<(CapsuleId, Reading)> {
    if capsules.is_empty() {
        return Vec::new();
    }
    let traffic: HashMap<Ipv4Addr, Traffic> = match host.traffic() {
        Ok(traffic) => traffic.into_iter().map(|(slot, traffic)| (slot.host_ip(), traffic)).collect(),
        Err(error) => {
            warn!(error = crate::chain(&error), "what capsules sent is not known");
            HashMap::new()
        }
    };
    let read = |(id, place): (CapsuleId, Option<Ipv4Addr>)| {
        let traffic = place.and_then(|place| traffic.get(&place)).copied().unwrap_or_default();
        // One that ends meanwhile has nothing to be read.
        let reading = read::read(host.cgroup(id).path(), &host.capsules().join(id.to_string()), traffic)?;
        Some((id, reading))
    };
    capsules.into_iter().filter_map(read).collect()
}
