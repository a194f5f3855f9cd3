//! Slots that are ready before anybody asks for one, and those that were given back.
//!
//! ```text
//!            make                    take
//!   nothing ──────► ready ──────────────────► in use
//!      ▲              ▲                          │
//!      │ destroy      │ clean                    │ give back
//!      └───────────── used ◄─────────────────────┘
//! ```
//!
//! One thread makes, cleans and destroys. It keeps out of the way: it begins nothing while somebody waits for a slot to be
//! made, nor, while there are enough, just after one was taken, when a VMM is about to start.
//!
//! Who takes a slot gets a [`Claim`], and only the claim that a slot is held by gives it back: whoever kept one for longer
//! changes nothing of what is somebody else's by now.
//!
//! All of them are claimed like any other slot, so what a killed process leaves of its pool is swept with the rest: taken
//! into the pool as used, and cleaned or removed like those.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::Error;
use crate::slot::Slot;
use crate::slots::Slots;

/// After a slot was taken. A start has done its own work with links by then.
const QUIET: Duration = Duration::from_millis(50);
/// After making one failed.
const AGAIN: Duration = Duration::from_secs(5);

/// A slot in the hands of who has taken it. It holds until the slot is given back; the next who has the slot has another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    slot: Slot,
    turn: u64,
}

impl Claim {
    /// Which slot.
    pub fn slot(self) -> Slot {
        self.slot
    }
}

pub(crate) struct Pool {
    pub(crate) slots: Slots,
    /// How many are to be ready.
    size: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// The one that was given back first is taken first.
    ready: VecDeque<Slot>,
    /// In use, by whose turn it is.
    held: HashMap<Slot, u64>,
    /// How often one was taken.
    turns: u64,
    /// Taken, but nobody has asked yet for it to be made.
    taken: HashSet<Slot>,
    used: VecDeque<Slot>,
    /// What the thread is at.
    working: Option<Slot>,
    /// What could be neither cleaned nor removed.
    broken: Vec<Slot>,
    /// How many slots are being made for somebody who waits.
    waiting: usize,
    /// Until when nothing is begun that can wait.
    quiet_until: Option<Instant>,
    /// When the next may be made, after one could not.
    again_at: Option<Instant>,
    is_swept: bool,
    is_closing: bool,
}

enum Job {
    Make(Slot),
    Clean(Slot),
    Destroy(Slot),
}

impl Pool {
    pub(crate) fn new(slots: Slots, size: usize) -> Self {
        Self { slots, size, state: Mutex::default(), changed: Condvar::new() }
    }

    /// A slot that is ready, or one that is only claimed.
    pub(crate) fn claim(&self) -> Result<Claim, Error> {
        let mut state = self.lock();
        if let Some(slot) = state.ready.pop_front() {
            state.taken.insert(slot);
            state.quiet_until = Some(Instant::now() + QUIET);
            self.changed.notify_all();
            return Ok(state.hand_out(slot));
        }
        drop(state);
        let slot = self.slots.claims.claim().map_err(Error::Claim)?.ok_or(Error::Exhausted)?;
        Ok(self.lock().hand_out(slot))
    }

    /// A slot that an earlier process claimed, for who has taken over what was in it.
    pub(crate) fn take_over(&self, slot: Slot) -> Result<Claim, Error> {
        let is_ours = self.slots.claims.owns(slot).map_err(Error::Claim)?;
        let mut state = self.lock();
        if !is_ours || state.has(slot) || state.held.contains_key(&slot) {
            return Err(Error::NotOurs(slot));
        }
        Ok(state.hand_out(slot))
    }

    /// Makes a claimed slot, unless it was ready.
    pub(crate) fn create(&self, slot: Slot) -> Result<(), Error> {
        let mut state = self.lock();
        if state.taken.remove(&slot) {
            return Ok(());
        }
        state.waiting += 1;
        drop(state);
        let created = self.slots.create(slot);
        self.lock().waiting -= 1;
        self.changed.notify_all();
        created
    }

    /// Takes a slot back, to be cleaned or removed by and by, or at once where nobody does that.
    pub(crate) fn give_back(&self, claim: Claim) -> Result<(), Error> {
        let Claim { slot, turn } = claim;
        let is_ours = self.slots.claims.owns(slot).map_err(Error::Claim)?;
        let mut state = self.lock();
        if state.held.get(&slot) != Some(&turn) {
            return Ok(());
        }
        // Before its number may be the next one's.
        state.held.remove(&slot);
        state.taken.remove(&slot);
        if !is_ours {
            return Ok(());
        }
        if self.size > 0 {
            state.used.push_back(slot);
            self.changed.notify_all();
            return Ok(());
        }
        drop(state);
        let destroyed = self.slots.destroy(slot);
        if destroyed.is_err() {
            self.lock().held.insert(slot, turn);
        }
        destroyed
    }

    /// Takes every slot of this instance that is not in `keep` as used, and returns them. Before that, nothing is made ahead:
    /// whose slots are whose was not known.
    pub(crate) fn sweep(&self, keep: &HashSet<Slot>) -> Result<Vec<Slot>, Error> {
        // While the thread can claim none.
        let mut state = self.lock();
        let mut others = self.slots.claims.all().map_err(Error::Claim)?;
        others.retain(|slot| !keep.contains(slot) && !state.has(*slot));
        for slot in &others {
            state.held.remove(slot);
        }
        if self.size > 0 {
            state.used.extend(&others);
        }
        state.is_swept = true;
        self.changed.notify_all();
        Ok(others)
    }

    /// What the thread does until the pool is closed.
    pub(crate) fn work(&self) {
        while let Some(job) = self.next() {
            let (slot, done) = match job {
                Job::Make(slot) => (slot, self.make(slot)),
                Job::Clean(slot) => (slot, self.clean(slot)),
                Job::Destroy(slot) => (slot, self.slots.destroy(slot).map(|()| false)),
            };
            let mut state = self.lock();
            state.working = None;
            match done {
                Ok(true) => state.ready.push_back(slot),
                Ok(false) => {}
                Err(error) => {
                    tracing::error!(%slot, error = &error as &dyn std::error::Error, "a slot cannot be removed");
                    state.broken.push(slot);
                }
            }
            self.changed.notify_all();
        }
    }

    /// Whether the slot is ready now; otherwise there is none any more.
    fn make(&self, slot: Slot) -> Result<bool, Error> {
        let Err(error) = self.slots.create(slot) else { return Ok(true) };
        tracing::warn!(%slot, error = &error as &dyn std::error::Error, "no slot could be made ahead");
        self.lock().again_at = Some(Instant::now() + AGAIN);
        self.slots.destroy(slot)?;
        Ok(false)
    }

    fn clean(&self, slot: Slot) -> Result<bool, Error> {
        let Err(error) = self.slots.clean(slot) else { return Ok(true) };
        tracing::warn!(%slot, error = &error as &dyn std::error::Error, "a slot is not used again");
        self.slots.destroy(slot)?;
        Ok(false)
    }

    /// Waits for something to do.
    fn next(&self) -> Option<Job> {
        let mut state = self.lock();
        while !state.is_closing {
            let now = Instant::now();
            let is_urgent = state.ready.len() <= self.size / 2 || state.used.len() > self.size;
            let quiet = state.quiet_until.filter(|until| *until > now && !is_urgent);
            if state.is_swept
                && state.waiting == 0
                && quiet.is_none()
                && let Some(job) = self.job(&mut state, now)
            {
                return Some(job);
            }
            let again = state.again_at.filter(|at| *at > now);
            state = match quiet.into_iter().chain(again).min() {
                Some(at) => self.changed.wait_timeout(state, at - now).unwrap_or_else(PoisonError::into_inner).0,
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
        None
    }

    fn job(&self, state: &mut State, now: Instant) -> Option<Job> {
        let is_wanted = state.ready.len() < self.size;
        // Low numbers stay and come back, so that what is ready on an idle machine is always the same.
        let used = state.used.front().copied();
        let highest = state.ready.iter().copied().enumerate().max_by_key(|(_, slot)| *slot);
        if let Some((index, highest)) = highest.filter(|_| !is_wanted)
            && used.map_or_else(|| self.slots.claims.is_lower_free(highest), |used| highest > used)
        {
            state.ready.remove(index);
            state.working = Some(highest);
            return Some(Job::Destroy(highest));
        }
        if let Some(used) = used {
            state.used.pop_front();
            state.working = Some(used);
            let is_kept = is_wanted && !self.slots.claims.is_lower_free(used);
            return Some(if is_kept { Job::Clean(used) } else { Job::Destroy(used) });
        }
        if !is_wanted || state.again_at.is_some_and(|at| at > now) {
            return None;
        }
        match self.slots.claims.claim() {
            Ok(Some(slot)) => {
                state.working = Some(slot);
                return Some(Job::Make(slot));
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, "no slot could be claimed ahead"),
        }
        state.again_at = Some(now + AGAIN);
        None
    }

    /// Has the thread end when it is done with what it is at.
    pub(crate) fn stop(&self) {
        self.lock().is_closing = true;
        self.changed.notify_all();
    }

    /// Removes all that the pool has. Its thread must have ended.
    pub(crate) fn empty(&self) -> Result<(), Error> {
        let state = std::mem::take(&mut *self.lock());
        let slots: Vec<Slot> = state.ready.into_iter().chain(state.used).chain(state.broken).collect();
        self.slots.destroy_all(&slots)
    }

    /// Waits until as many are ready as are to be, and none is to be cleaned.
    #[cfg(test)]
    pub(crate) fn settle(&self) -> Vec<Slot> {
        let mut state = self.lock();
        while state.ready.len() < self.size || !state.used.is_empty() || state.working.is_some() {
            state = self.changed.wait(state).unwrap();
        }
        state.ready.iter().copied().collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn hand_out(&mut self, slot: Slot) -> Claim {
        self.turns += 1;
        self.held.insert(slot, self.turns);
        Claim { slot, turn: self.turns }
    }

    fn has(&self, slot: Slot) -> bool {
        self.working == Some(slot)
            || self.ready.contains(&slot)
            || self.used.contains(&slot)
            || self.broken.contains(&slot)
    }
}
