//! An agent, a pager or a VMM that is killed at any instant of a pause, a resume, a fork, a merge, an upload or what follows one:
//! afterwards each capsule runs, or is paused, here or in the object store, and can be resumed with all that it was told last,
//! or has failed with a reason. At the end nothing is left of any of it.
//!
//! `WRENN_KILLS` is the number of random instants for each victim; `WRENN_SEED` repeats a run's choices, though not its
//! timing. With 200 instants or more, each victim dies at every commit point of the agent, else at some of them.

#![expect(clippy::print_stderr, reason = "a failed run is understood by what it did before")]

pub mod agent;
mod trace;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use agent_api::{
    Capsule, CapsuleSpec, CapsuleState, DeleteTemplateRequest, ListCapsulesRequest, SnapshotCapsuleRequest,
};
use api::CapsuleId;
use connectrpc::{ConnectError, ErrorCode};
use rustix::process::Pid;
use snapshot::MERGE_AT;

use crate::common::{Caller, spec};
use agent::{Killable, Kind, is_remote, kill, processes};
use trace::Trace;

/// What every capsule here has besides: something in memory that never changes.
const KEEP: &str = "head -c 24M /dev/urandom > /dev/shm/big; md5sum < /dev/shm/big > /dev/shm/big.sum";
/// Writes something new into memory and disk, and says what.
const WRITE: &str = "head -c 1M /dev/urandom > /dev/shm/m; cp /dev/shm/m /root/m; md5sum < /dev/shm/m > /dev/shm/sum; \
    cp /dev/shm/sum /root/sum; cat /dev/shm/sum";
/// Says in four ways what was written last, after a look at what never changes.
const READ: &str = "test \"$(md5sum < /dev/shm/big)\" = \"$(cat /dev/shm/big.sum)\" || echo big; \
    md5sum < /dev/shm/m; md5sum < /root/m; cat /dev/shm/sum /root/sum";
/// The template that capsules begin from which take the place of one that failed.
const TEMPLATE: &str = "golden";

/// How long one attempt may take, whatever is killed: what takes longer hangs.
const LIMIT: Duration = Duration::from_secs(600);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Verb {
    Pause,
    Resume,
    Fork,
    /// What follows a pause when there are many generations.
    Merge,
    /// What follows a pause when there is an object store.
    Upload,
    Hibernate,
    /// A resume from the object store, until all memory is here.
    Adopt,
}

/// What happens on one host, and what needs an object store.
const HERE: &[Verb] = &[Verb::Pause, Verb::Resume, Verb::Fork];
const BEYOND: &[Verb] = &[Verb::Upload, Verb::Hibernate, Verb::Adopt];
/// During which a pager fetches.
const COMING: &[Verb] = &[Verb::Adopt];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Agent,
    Of(Kind),
}

/// Random instants for each victim.
fn kills() -> usize {
    std::env::var("WRENN_KILLS").map_or(8, |kills| kills.parse().expect("WRENN_KILLS is a number"))
}

/// Numbers that are all determined by the first, which is printed.
struct Random(u64);

impl Random {
    fn new() -> Self {
        let seed = std::env::var("WRENN_SEED")
            .map_or_else(|_| getrandom::u64().unwrap(), |seed| seed.parse().expect("WRENN_SEED is a number"));
        eprintln!("WRENN_SEED={seed}");
        Self(seed)
    }

    /// Below `end`. SplitMix64, and the modulo's bias is of no concern.
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }
}

/// An agent with one capsule, and what that was told last.
struct World {
    agent: Killable,
    verbs: &'static [Verb],
    id: CapsuleId,
    sum: String,
    random: Random,
    /// How long each verb takes when nobody is killed.
    spans: BTreeMap<Verb, Duration>,
    /// Before there was anything.
    usage: u64,
    /// What became of the capsule, how often.
    outcomes: BTreeMap<String, usize>,
}

impl World {
    async fn open(verbs: &'static [Verb]) -> Self {
        let random = Random::new();
        let agent = Killable::start(verbs != HERE).await;
        let (id, usage) = (CapsuleId::random(), agent.usage());
        agent.caller().create(spec(id)).await.unwrap();
        agent.caller().sh(id, KEEP).await;
        let snapshot = SnapshotCapsuleRequest { id: id.to_string(), name: TEMPLATE.into(), ..Default::default() };
        agent.caller().lifecycle().snapshot_capsule(snapshot).await.unwrap();
        let (spans, outcomes) = (BTreeMap::new(), BTreeMap::new());
        let mut world = Self { agent, verbs, id, sum: String::new(), random, spans, usage, outcomes };
        for &verb in verbs {
            world.prepare(verb).await.unwrap();
            let begun = Instant::now();
            world.ask(verb).await.unwrap();
            world.spans.insert(verb, begun.elapsed());
            world.children_are_whole().await;
        }
        // A merge follows a pause, and nobody says when it is done.
        world.spans.insert(Verb::Merge, Duration::from_millis(400));
        world
    }

    /// Has something new written, and brings the capsule to where `verb` begins.
    async fn prepare(&mut self, verb: Verb) -> Result<(), ConnectError> {
        let (id, caller) = (self.id, self.agent.caller());
        self.wake().await?;
        self.sum = caller.try_sh(id, WRITE).await?;
        match verb {
            Verb::Pause | Verb::Fork => {}
            Verb::Resume | Verb::Merge | Verb::Upload | Verb::Hibernate => _ = caller.pause(id).await?,
            Verb::Adopt => {
                caller.pause(id).await?;
                caller.hibernate(id).await?;
            }
        }
        Ok(())
    }

    /// Resumes the capsule, wherever it is.
    async fn wake(&self) -> Result<(), ConnectError> {
        let caller = self.agent.caller();
        match caller.resume(self.id).await {
            Err(error) if error.code == ErrorCode::NotFound => caller.adopt(self.id).await?,
            resumed => resumed?,
        };
        Ok(())
    }

    /// Does `verb`, which for a merge or an upload is only to wait for it.
    fn ask(&self, verb: Verb) -> tokio::task::JoinHandle<()> {
        let (id, caller) = (self.id, self.agent.caller());
        let record = self.agent.root().join("capsules").join(id.to_string()).join("record.json");
        tokio::spawn(async move {
            // What comes of it is looked at later.
            match verb {
                Verb::Pause => drop(caller.pause(id).await),
                Verb::Resume => drop(caller.resume(id).await),
                Verb::Fork => drop(caller.fork(id, &[CapsuleId::random()]).await),
                Verb::Merge => {}
                Verb::Upload => while !is(&caller, id, |capsule| capsule.uploaded).await.unwrap_or(true) {},
                Verb::Hibernate => drop(caller.hibernate(id).await),
                Verb::Adopt => {
                    drop(caller.adopt(id).await);
                    // Until the agent notices that all is here, or that it runs no more.
                    let is_running = |capsule: &Capsule| capsule.state == CapsuleState::Running;
                    while is_remote(&record) && is(&caller, id, is_running).await.unwrap_or(false) {}
                }
            }
        })
    }

    fn choose(&mut self) -> Verb {
        if self.agent.generations_of(self.id) + 1 >= MERGE_AT {
            return Verb::Merge;
        }
        self.verbs[self.random.below(self.verbs.len() as u64) as usize]
    }

    /// Kills `victim` at a random instant of `verb`. False when there was none to kill.
    async fn strike(&mut self, victim: Victim, verb: Verb) -> bool {
        while self.prepare(verb).await.is_err() {
            // What was killed last is missed only now.
            self.is_whole(victim).await;
        }
        let instant = Duration::from_micros(self.random.below(self.spans[&verb].as_micros() as u64 * 5 / 4));
        let asked = self.ask(verb);
        let begun = Instant::now();
        tokio::time::sleep(instant).await;
        let is_killed = match victim {
            Victim::Agent => {
                self.agent.kill();
                true
            }
            Victim::Of(kind) => loop {
                let pids = processes(&self.agent.instance(), kind);
                if !pids.is_empty() {
                    kill(pids[self.random.below(pids.len() as u64) as usize]);
                    break true;
                }
                // A resume has none yet, a pause has none any more.
                if asked.is_finished() {
                    break false;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            },
        };
        eprintln!("{victim:?} killed: {is_killed}, {:?} into {verb:?}", begun.elapsed());
        asked.await.unwrap();
        if victim == Victim::Agent {
            self.agent.restart().await;
        }
        is_killed
    }

    /// Whatever was killed, the capsule is one of three things. One that failed is replaced.
    async fn is_whole(&mut self, victim: Victim) {
        let mut outcome = None;
        let capsule = match self.agent.settled(self.id).await.expect("it is still told what became of it") {
            capsule if capsule.state != CapsuleState::Hibernated => capsule,
            _ => {
                outcome = Some("hibernated");
                self.agent.caller().adopt(self.id).await.unwrap();
                self.agent.settled(self.id).await.unwrap()
            }
        };
        self.children_are_whole().await;
        let outcome = match self.read(&capsule).await {
            Some(state) => outcome.unwrap_or(state),
            None => {
                // Only its own processes take a capsule with them.
                assert_ne!(victim, Victim::Agent, "the capsule has failed");
                if self.verbs != HERE {
                    self.is_whole_as_uploaded().await;
                }
                self.id = CapsuleId::random();
                let from = CapsuleSpec { image: TEMPLATE.into(), ..spec(self.id) };
                self.agent.caller().create(from).await.unwrap();
                "failed"
            }
        };
        *self.outcomes.entry(outcome.to_owned()).or_default() += 1;
        self.agent.storage_is_clean().await;
    }

    /// What the object store has of a capsule that failed is some moment of it, whole. It is forgotten then.
    async fn is_whole_as_uploaded(&self) {
        let caller = self.agent.caller();
        caller.adopt(self.id).await.unwrap();
        let read = caller.sh(self.id, READ).await;
        let mut lines: Vec<_> = read.lines().collect();
        lines.dedup();
        assert_eq!(lines.len(), 1, "{} is no moment that it was: {read}", self.id);
        caller.forget(self.id).await;
    }

    /// Reads back what the capsule was told last; `None` when it has failed, with a reason.
    async fn read(&self, capsule: &Capsule) -> Option<&'static str> {
        let (id, caller) = (capsule.id.parse().unwrap(), self.agent.caller());
        let mut outcome = "running";
        loop {
            let capsule = self.agent.settled(id).await.expect("it is still told what became of it");
            if capsule.state == CapsuleState::Failed {
                assert!(!capsule.reason.is_empty());
                return None;
            }
            if capsule.state == CapsuleState::Paused {
                outcome = "paused";
                caller.resume(id).await.unwrap();
            }
            match caller.try_sh(id, READ).await {
                Ok(read) => {
                    assert_eq!(read, [self.sum.as_str(); 4].join("\n"), "{id} is not what it was");
                    return Some(outcome);
                }
                // It ran until just now, and nobody has noticed yet.
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// Looks at every capsule but the one, and ends it.
    async fn children_are_whole(&self) {
        for capsule in self.agent.capsules().await {
            let id: CapsuleId = capsule.id.parse().unwrap();
            if id == self.id {
                continue;
            }
            let Some(capsule) = self.agent.settled(id).await else { continue };
            let is_here = capsule.state == CapsuleState::Running || capsule.state == CapsuleState::Paused;
            if is_here {
                self.read(&capsule).await;
                self.agent.caller().destroy(id).await;
            } else {
                assert!(!capsule.reason.is_empty(), "{id} ended without a reason");
            }
        }
    }

    /// Ends the capsule and all that came of it, after which there is nothing more than in the beginning.
    async fn end(self) {
        eprintln!("{:?}", self.outcomes);
        self.agent.caller().forget(self.id).await;
        let forget = DeleteTemplateRequest { name: TEMPLATE.into(), ..Default::default() };
        self.agent.caller().lifecycle().delete_template(forget).await.unwrap();
        let nothing_is_left = async {
            while self.agent.holds() != (0, 0, 0) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let waited = tokio::time::timeout(LIMIT, nothing_is_left).await;
        assert!(waited.is_ok(), "it still holds {:?}", self.agent.holds());
        self.agent.storage_is_clean().await;
        assert_eq!(self.agent.usage(), self.usage);
        // Chunks go once the leases of killed uploads have run out; nothing names them any more.
        if let Some(objects) = self.agent.objects().await {
            // The image stays a while, as others may need it.
            let are_images = objects.uploads.iter().all(|name| name.starts_with("images/"));
            assert!(are_images && objects.missing.is_empty() && objects.broken.is_empty(), "{objects:?}");
        }
        assert!(self.agent.end());
    }
}

/// Whether the capsule is listed and is like that. An error when the agent is gone.
async fn is(caller: &Caller, id: CapsuleId, like: impl Fn(&Capsule) -> bool) -> Result<bool, ConnectError> {
    tokio::time::sleep(Duration::from_millis(5)).await;
    let listed = caller.lifecycle().list_capsules(ListCapsulesRequest::default()).await?.into_owned();
    Ok(listed.capsules.iter().any(|capsule| capsule.id == id.to_string() && like(capsule)))
}

async fn survives_random_kills(victim: Victim, verbs: &'static [Verb]) {
    let mut world = World::open(verbs).await;
    // A way to the object store takes several times as long as what happens here.
    let mut kills = if verbs == HERE { kills() } else { kills().div_ceil(2) };
    while kills > 0 {
        let verb = world.choose();
        let attempt = async {
            let is_killed = world.strike(victim, verb).await;
            world.is_whole(victim).await;
            is_killed
        };
        let begun = Instant::now();
        match tokio::time::timeout(LIMIT, attempt).await {
            Ok(is_killed) => {
                kills -= usize::from(is_killed);
                eprintln!("whole after {:?}", begun.elapsed());
            }
            Err(_) => panic!("it hangs after a kill during {verb:?}: {:?}", world.agent.capsules().await),
        }
    }
    world.end().await;
}

#[tokio::test]
async fn an_agent_that_is_killed_at_a_random_instant_loses_nothing() {
    survives_random_kills(Victim::Agent, HERE).await;
}

#[tokio::test]
async fn a_pager_that_is_killed_at_a_random_instant_loses_nothing_silently() {
    survives_random_kills(Victim::Of(Kind::Pager), HERE).await;
}

#[tokio::test]
async fn a_vmm_that_is_killed_at_a_random_instant_loses_nothing_silently() {
    survives_random_kills(Victim::Of(Kind::Vmm), HERE).await;
}

#[tokio::test]
async fn an_agent_that_is_killed_on_the_way_to_the_object_store_or_back_loses_nothing() {
    survives_random_kills(Victim::Agent, BEYOND).await;
}

#[tokio::test]
async fn a_pager_that_is_killed_while_memory_comes_loses_nothing_silently() {
    survives_random_kills(Victim::Of(Kind::Pager), COMING).await;
}

/// Kills `victim` as the agent enters any of its commits during each verb, or every `step` of them.
async fn survives_kills_at_commit_points(victim: Victim, verbs: &'static [Verb], step: usize) {
    let mut world = World::open(verbs).await;
    let step = if kills() < 200 { step } else { 1 };
    for &verb in verbs {
        let mut at = 1 + world.random.below(step as u64) as usize;
        loop {
            world.prepare(verb).await.unwrap();
            let (pid, instance) = (world.agent.pid(), world.agent.instance());
            let is_over = Arc::new(AtomicBool::new(false));
            let is_late = is_over.clone();
            let strike = move || {
                match victim {
                    // What is done to see that all is whole is no part of the verb.
                    _ if is_late.load(Ordering::SeqCst) => return false,
                    Victim::Agent => kill(Pid::from_raw(pid as i32).expect("a child has a number")),
                    Victim::Of(kind) => processes(&instance, kind).into_iter().for_each(kill),
                }
                true
            };
            let trace = Trace::begin(pid, at, strike);
            world.ask(verb).await.unwrap();
            // What happens beside the verb, such as a merge, counts as long as this lasts.
            tokio::time::sleep(Duration::from_millis(100)).await;
            is_over.store(true, Ordering::SeqCst);
            if victim != Victim::Agent {
                world.is_whole(victim).await;
            }
            world.agent.kill();
            let seen = trace.end();
            world.agent.restart().await;
            if victim == Victim::Agent {
                world.is_whole(victim).await;
            }
            eprintln!("{victim:?}, {verb:?}: {seen:?}");
            if !seen.is_struck {
                assert!(seen.commits > 5, "{verb:?} has only {} commits", seen.commits);
                break;
            }
            at += step;
        }
    }
    world.end().await;
}

#[tokio::test]
async fn an_agent_that_is_killed_at_a_commit_point_loses_nothing() {
    survives_kills_at_commit_points(Victim::Agent, HERE, 7).await;
}

#[tokio::test]
async fn an_agent_that_is_killed_at_a_commit_point_on_the_way_to_the_object_store_or_back_loses_nothing() {
    survives_kills_at_commit_points(Victim::Agent, BEYOND, 20).await;
}

#[tokio::test]
async fn a_pager_that_is_killed_at_a_commit_point_loses_nothing_silently() {
    survives_kills_at_commit_points(Victim::Of(Kind::Pager), HERE, 20).await;
}

#[tokio::test]
async fn a_vmm_that_is_killed_at_a_commit_point_loses_nothing_silently() {
    survives_kills_at_commit_points(Victim::Of(Kind::Vmm), HERE, 20).await;
}
