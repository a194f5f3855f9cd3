use proptest::prelude::*;

use super::*;

fn desired() -> impl Strategy<Value = Desired> {
    prop_oneof![Just(Desired::Running), Just(Desired::Stopped)]
}

fn observed() -> impl Strategy<Value = Observed> {
    use Observed::*;
    prop_oneof![
        Just(Unreported),
        Just(Starting),
        Just(Running),
        Just(Stopping),
        Just(Missing),
        Just(Stopped),
        Just(Failed)
    ]
}

fn host_state() -> impl Strategy<Value = HostState> {
    use HostState::*;
    prop_oneof![Just(Starting), Just(Running), Just(Stopping), Just(Stopped), Just(Failed)]
}

fn state() -> impl Strategy<Value = State> {
    (desired(), observed(), 0..8u64).prop_map(|(desired, observed, generation)| State { desired, observed, generation })
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        8 => (host_state(), 0..8u64).prop_map(|(state, generation)| Event::Reported { state, generation }),
        1 => Just(Event::StartFailed),
        1 => Just(Event::Destroyed),
        2 => Just(Event::Absent),
    ]
}

fn word(state: State) -> Status {
    status(state.desired, state.observed)
}

proptest! {
    #[test]
    fn every_sequence_of_facts_is_monotonic(facts in prop::collection::vec(event(), 0..30), stop_at in 0..30usize) {
        let mut state = State::NEW;
        for (index, fact) in facts.into_iter().enumerate() {
            if index == stop_at {
                state.desired = Desired::Stopped;
            }
            let Some(next) = observe(state, fact) else { continue };
            prop_assert_ne!(next, state, "a change that changes nothing");
            prop_assert!(next.generation >= state.generation);
            prop_assert_eq!(next.desired, state.desired, "facts do not change wishes");
            prop_assert!(!state.observed.ended(), "{:?} came back", state);
            prop_assert_ne!(next.observed, Observed::Unreported);
            state = next;
        }
    }

    #[test]
    fn a_late_report_changes_nothing(state in state(), reported in host_state(), behind in 1..8u64) {
        prop_assume!(state.generation >= behind);
        let late = Event::Reported { state: reported, generation: state.generation - behind };
        prop_assert_eq!(observe(state, late), None);
    }

    #[test]
    fn the_order_of_reports_does_not_matter(reports in prop::collection::vec(host_state(), 1..8), order: u64) {
        // One report per generation, none final but the last, as a host makes them; delivered in any order.
        let last = reports.len() - 1;
        prop_assume!(reports[..last].iter().all(|state| !matches!(state, HostState::Stopped | HostState::Failed)));
        let mut facts: Vec<_> =
            reports.iter().enumerate().map(|(n, &state)| Event::Reported { state, generation: n as u64 + 1 }).collect();
        let apply = |facts: &[Event]| facts.iter().fold(State::NEW, |state, &fact| observe(state, fact).unwrap_or(state));
        let in_order = apply(&facts);
        let mut seed = order;
        for n in (1..facts.len()).rev() {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            facts.swap(n, (seed >> 33) as usize % (n + 1));
        }
        prop_assert_eq!(apply(&facts), in_order);
    }

    #[test]
    fn stopping_wins(observed in observed(), facts in prop::collection::vec(event(), 0..30)) {
        let mut state = State { desired: Desired::Stopped, observed, generation: 0 };
        for fact in facts {
            prop_assert!(matches!(word(state), Status::Stopping | Status::Stopped), "{:?}", state);
            prop_assert!(matches!(decide(state, Command::Exec), Decision::Refuse));
            prop_assert!(matches!(decide(state, Command::Destroy), Decision::Act | Decision::Done));
            state = observe(state, fact).unwrap_or(state);
        }
        prop_assert_eq!(word(observe(state, Event::Destroyed).unwrap_or(state)), Status::Stopped);
    }

    #[test]
    fn only_a_running_capsule_is_used(state in state()) {
        for command in [Command::Touch, Command::Exec] {
            let expected = match word(state) {
                Status::Running => Decision::Act,
                Status::Pending | Status::Starting => Decision::Wait,
                _ => Decision::Refuse,
            };
            prop_assert_eq!(decide(state, command), expected, "{:?}", state);
        }
        prop_assert_eq!(decide(state, Command::Destroy) == Decision::Done, state.desired == Desired::Stopped && state.observed.ended());
    }

    #[test]
    fn a_wanted_capsule_is_never_destroyed(state in state(), on_host in prop::option::of(host_state()), age: u32) {
        let action = reconcile(state, on_host, Duration::from_secs(age.into()));
        let wanted = state.desired == Desired::Running && !state.observed.ended();
        prop_assert!(action != Action::Destroy || !wanted);
        prop_assert!(action != Action::Create || wanted);
    }

    /// A host that obeys, and a reconciler that comes around: whatever happened before, wish and fact agree in the end.
    #[test]
    fn reconciling_converges(
        start in state(),
        mut on_host in prop::option::of(host_state()),
        progress in prop::collection::vec(any::<bool>(), 12),
    ) {
        let mut state = start;
        // The host is ahead of what is known.
        let mut generation = start.generation + 1;
        let old = CREATE_GRACE;
        let mut destroyed = false;
        for step in progress.into_iter().chain([true; 12]) {
            let fact = on_host.map_or(Event::Absent, |state| Event::Reported { state, generation });
            state = observe(state, fact).unwrap_or(state);
            match reconcile(state, on_host, old) {
                Action::Nothing => {}
                Action::Create => (on_host, generation) = (Some(HostState::Starting), generation + 1),
                Action::Destroy => {
                    (on_host, generation, destroyed) = (None, generation + 1, true);
                    state = observe(state, Event::Destroyed).unwrap_or(state);
                }
            }
            // The host's own progress.
            let next = match on_host {
                Some(HostState::Starting) => Some(HostState::Running),
                Some(HostState::Stopping) => Some(HostState::Stopped),
                other => other,
            };
            if step && next != on_host {
                (on_host, generation) = (next, generation + 1);
            }
        }
        let runs = on_host == Some(HostState::Running);
        prop_assert_eq!(word(state) == Status::Running, runs, "{:?} {:?}", state, on_host);
        if start.desired == Desired::Stopped || start.observed.ended() {
            prop_assert!(state.observed.ended() && !runs);
        } else {
            prop_assert!(!destroyed);
        }
    }
}

#[test]
fn a_whole_life() {
    let report = |state, generation| Event::Reported { state, generation };
    let mut state = State::NEW;
    let mut seen = vec![word(state)];
    for fact in [
        report(HostState::Starting, 1),
        report(HostState::Running, 2),
        report(HostState::Starting, 1),
        Event::Absent,
        report(HostState::Running, 2),
        report(HostState::Stopping, 3),
        Event::Absent,
        report(HostState::Running, 9),
    ] {
        state = observe(state, fact).unwrap_or(state);
        seen.push(word(state));
    }
    use Status::*;
    assert_eq!(seen, [Pending, Starting, Running, Running, Missing, Running, Stopping, Stopped, Stopped]);
}

#[test]
fn a_lost_request_is_made_again_only_after_a_while() {
    assert_eq!(reconcile(State::NEW, None, Duration::ZERO), Action::Nothing);
    assert_eq!(reconcile(State::NEW, None, CREATE_GRACE), Action::Create);
    let missing = State { observed: Observed::Missing, ..State::NEW };
    assert_eq!(
        reconcile(missing, None, CREATE_GRACE),
        Action::Nothing,
        "what ran once is not started over behind its owner's back"
    );
}

#[test]
fn what_failed_to_start_but_runs_is_ended() {
    let failed = observe(State::NEW, Event::StartFailed).unwrap();
    assert_eq!(word(failed), Status::Error);
    assert_eq!(reconcile(failed, Some(HostState::Running), Duration::ZERO), Action::Destroy);
    assert_eq!(word(State { desired: Desired::Stopped, ..failed }), Status::Stopped);
}
