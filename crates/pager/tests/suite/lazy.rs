//! Memory that is elsewhere, and comes when it is touched.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex};

use pager::{Ended, Error, Fetch, FetchError, PAGE};
use snapshot::Id;

use crate::stored::{DEADLINE, PAGES, Stored, start_lazy};
use crate::vmm::{Kind, Vmm};

/// Keeps pages back that are there: one fetch brings 16 of them.
#[derive(Debug, Default)]
struct Far {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    came: HashSet<(Id, u64)>,
    /// What was asked for, in that order.
    asked: Vec<(Id, u64)>,
    is_shut: bool,
    is_broken: bool,
}

const UNIT: u64 = 16 * PAGE;

impl Far {
    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
        self.changed.notify_all();
    }

    /// Waits until so many fetches were asked for.
    fn until_asked(&self, count: usize) {
        let state = self.state.lock().unwrap();
        let (_state, waited) =
            self.changed.wait_timeout_while(state, DEADLINE, |state| state.asked.len() < count).unwrap();
        assert!(!waited.timed_out());
    }
}

impl Fetch for Far {
    fn is_present(&self, generation: Id, bytes: Range<u64>) -> bool {
        let state = self.state.lock().unwrap();
        (bytes.start / UNIT..bytes.end.div_ceil(UNIT)).all(|unit| state.came.contains(&(generation, unit)))
    }

    fn fetch(&self, generation: Id, bytes: Range<u64>) -> Result<(), FetchError> {
        let units: Vec<_> = (bytes.start / UNIT..bytes.end.div_ceil(UNIT)).map(|unit| (generation, unit)).collect();
        self.set(|state| state.asked.extend(&units));
        let mut state = self.changed.wait_while(self.state.lock().unwrap(), |state| state.is_shut).unwrap();
        if state.is_broken {
            return Err("it is gone".into());
        }
        state.came.extend(units);
        Ok(())
    }
}

#[test]
fn what_is_touched_comes_and_is_right() {
    let stored = Stored::new();
    for kind in [Kind::Anonymous, Kind::Shared, Kind::Tracked, Kind::Huge] {
        let Some(mut vmm) = Vmm::new(kind, PAGES * PAGE) else { continue };
        let far = Arc::new(Far::default());
        let pager = start_lazy(stored.config(), far.clone());
        vmm.connect(&stored.socket());
        assert_eq!(vmm.touch(40), stored.page(40)[0]);
        if kind != Kind::Huge {
            let asked = far.state.lock().unwrap().asked.len();
            assert!((1..8).contains(&asked), "{kind:?}: {asked} for one page and its neighbours");
        }
        for page in 0..PAGES {
            assert!(vmm.read(page) == *stored.page(page), "{kind:?}: page {page}");
        }
        let ended = pager.stop().unwrap();
        assert!(matches!(ended, Ended::Stopped | Ended::Whole), "{kind:?}: {ended:?}");
    }
}

#[test]
fn who_waits_for_what_is_far_does_not_hold_up_others() {
    let stored = Stored::new();
    let mut vmm = Vmm::new(Kind::Anonymous, PAGES * PAGE).unwrap();
    let far = Arc::new(Far::default());
    let pager = start_lazy(stored.config(), far.clone());
    vmm.connect(&stored.socket());
    far.set(|state| state.is_shut = true);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| vmm.touch(850));
        far.until_asked(1);
        // Zeros are here, whatever is not, and a removal is answered.
        let zero = (0..PAGES).find(|page| stored.page(*page)[0] == 0).unwrap();
        assert_eq!(vmm.touch(zero), 0);
        vmm.remove(500, 1);
        assert_eq!(vmm.touch(500), 0);
        assert!(!waiting.is_finished());
        far.set(|state| state.is_shut = false);
        assert_eq!(waiting.join().unwrap(), stored.page(850)[0]);
    });
    pager.stop().unwrap();
}

#[test]
fn what_does_not_come_ends_it() {
    let stored = Stored::new();
    let mut vmm = Vmm::new(Kind::Anonymous, PAGES * PAGE).unwrap();
    let far = Arc::new(Far::default());
    let pager = start_lazy(stored.config(), far.clone());
    vmm.connect(&stored.socket());
    far.set(|state| state.is_broken = true);
    std::thread::scope(|scope| {
        let hung = scope.spawn(|| vmm.touch(40));
        let error = pager.end().unwrap_err();
        assert!(matches!(error, Error::Fetch { .. }), "{error:?}");
        assert_eq!(error.exit_code(), 13);
        // Its owner would end the VMM now.
        vmm.unregister();
        hung.join().unwrap();
    });
}
