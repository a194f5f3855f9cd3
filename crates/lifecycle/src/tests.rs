use proptest::prelude::*;

use super::*;

fn desired() -> impl Strategy<Value = Desired> {
    prop_oneof![Just(Desired::Running), Just(Desired::Paused), Just(Desired::Stopped)]
}

fn observed() -> impl Strategy<Value = Observed> {
    use Observed::*;
    prop_oneof![
        Just(Unreported),
        Just(Starting),
        Just(Running),
        Just(Pausing),
        Just(Paused),
        Just(Uploaded),
        Just(Hibernated),
        Just(Resuming),
        Just(Stopping),
        Just(Missing),
        Just(Stopped),
        Just(Failed)
    ]
}

fn host_state() -> impl Strategy<Value = HostState> {
    use HostState::*;
    prop_oneof![
        Just(Starting),
        Just(Running),
        Just(Pausing),
        Just(Paused),
        Just(Uploaded),
        Just(Hibernated),
        Just(Resuming),
        Just(Stopping),
        Just(Stopped),
        Just(Failed)
    ]
}

fn origin() -> impl Strategy<Value = Origin> {
    prop_oneof![Just(Origin::Template), Just(Origin::Fork)]
}

fn command() -> impl Strategy<Value = Command> {
    use Command::*;
    prop_oneof![
        Just(Destroy),
        Just(Pause),
        Just(Hibernate),
        Just(Resume),
        Just(Touch),
        Just(Exec),
        Just(Fork),
        Just(Snapshot)
    ]
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
        for command in [Command::Touch, Command::Exec, Command::Fork, Command::Snapshot] {
            let expected = match word(state) {
                Status::Running => Decision::Act,
                Status::Pending | Status::Starting | Status::Pausing | Status::Resuming => Decision::Wait,
                _ => Decision::Refuse,
            };
            prop_assert_eq!(decide(state, command), expected, "{:?}", state);
        }
        prop_assert_eq!(decide(state, Command::Destroy) == Decision::Done, state.desired == Desired::Stopped && state.observed.ended());
    }

    /// What is done already shows, and what is refused cannot become possible by waiting for what goes on.
    #[test]
    fn pause_and_resume_follow_the_word(state in state()) {
        let (pause, resume) = (decide(state, Command::Pause), decide(state, Command::Resume));
        match word(state) {
            Status::Running => prop_assert_eq!((pause, resume), (Decision::Act, Decision::Done)),
            Status::Paused | Status::Hibernated => prop_assert_eq!((pause, resume), (Decision::Done, Decision::Act)),
            // A pause that is under way may be asked for again: its host does it once.
            Status::Pausing => {
                prop_assert_eq!(pause == Decision::Act, state.observed == Observed::Running);
                prop_assert_eq!(resume, Decision::Wait);
            }
            Status::Pending | Status::Starting | Status::Resuming => {
                prop_assert_eq!((pause, resume), (Decision::Wait, Decision::Wait));
            }
            _ => prop_assert_eq!((pause, resume), (Decision::Refuse, Decision::Refuse)),
        }
    }

    /// It has to be paused, or about to be.
    #[test]
    fn hibernating_follows_the_word(state in state()) {
        let expected = match word(state) {
            Status::Paused => Decision::Act,
            Status::Hibernated => Decision::Done,
            Status::Pausing if state.observed != Observed::Resuming => Decision::Wait,
            _ => Decision::Refuse,
        };
        prop_assert_eq!(decide(state, Command::Hibernate), expected, "{:?}", state);
    }

    /// Nobody waits for what does not come: a host that goes on with what it is doing leads out of every wait.
    #[test]
    fn waiting_ends(start in state(), command in command()) {
        let mut state = start;
        for generation in start.generation + 1..start.generation + 6 {
            if decide(state, command) != Decision::Wait {
                return Ok(());
            }
            let next = match (state.observed, state.desired) {
                (Observed::Running, Desired::Paused) => HostState::Pausing,
                (Observed::Pausing, _) => HostState::Paused,
                (Observed::Unreported, _) => HostState::Starting,
                (Observed::Starting | Observed::Resuming, _) => HostState::Running,
                other => panic!("nothing goes on in {other:?}"),
            };
            state = observe(state, Event::Reported { state: next, generation }).expect("it is news");
        }
        prop_assert!(false, "{:?} still waits in {:?}", start, state);
    }

    #[test]
    fn a_wanted_capsule_is_never_destroyed(
        state in state(),
        origin in origin(),
        on_host in prop::option::of(host_state()),
        age: u32,
    ) {
        let action = reconcile(state, origin, on_host, Duration::from_secs(age.into()));
        let wanted = state.desired != Desired::Stopped && !state.observed.ended();
        prop_assert!(action != Action::Destroy || !wanted);
        prop_assert!(action != Action::Create || (wanted && origin == Origin::Template));
        prop_assert!(action != Action::GiveUp || (wanted && origin == Origin::Fork && on_host.is_none()));
        prop_assert!(action != Action::Pause || (state.desired == Desired::Paused && on_host == Some(HostState::Running)));
    }

    /// A host that obeys, and a reconciler that comes around: whatever happened before, wish and fact agree in the end.
    #[test]
    fn reconciling_converges(
        start in state(),
        origin in origin(),
        mut on_host in prop::option::of(host_state()),
        progress in prop::collection::vec(any::<bool>(), 12),
    ) {
        let mut state = start;
        // The host is ahead of what is known.
        let mut generation = start.generation + 1;
        let old = FORK_GRACE;
        let mut destroyed = false;
        for step in progress.into_iter().chain([true; 12]) {
            let fact = on_host.map_or(Event::Absent, |state| Event::Reported { state, generation });
            state = observe(state, fact).unwrap_or(state);
            match reconcile(state, origin, on_host, old) {
                Action::Nothing => {}
                Action::Create => (on_host, generation) = (Some(HostState::Starting), generation + 1),
                Action::Pause => (on_host, generation) = (Some(HostState::Pausing), generation + 1),
                Action::Destroy => {
                    (on_host, generation, destroyed) = (None, generation + 1, true);
                    state = observe(state, Event::Destroyed).unwrap_or(state);
                }
                Action::GiveUp => state = observe(state, Event::StartFailed).unwrap_or(state),
            }
            // The host's own progress.
            let next = match on_host {
                Some(HostState::Starting | HostState::Resuming) => Some(HostState::Running),
                Some(HostState::Pausing) => Some(HostState::Paused),
                Some(HostState::Stopping) => Some(HostState::Stopped),
                other => other,
            };
            if step && next != on_host {
                (on_host, generation) = (next, generation + 1);
            }
        }
        let runs = on_host == Some(HostState::Running);
        let paused = matches!(on_host, Some(HostState::Paused | HostState::Uploaded));
        prop_assert_eq!(word(state) == Status::Running, runs, "{:?} {:?}", state, on_host);
        prop_assert_eq!(word(state) == Status::Paused, paused, "{:?} {:?}", state, on_host);
        if start.desired == Desired::Stopped || start.observed.ended() {
            prop_assert!(state.observed.ended() && !runs && !paused);
        } else {
            prop_assert!(!destroyed);
            prop_assert!(start.desired != Desired::Paused || !runs);
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
fn asleep_and_awake() {
    let report = |state, generation| Event::Reported { state, generation };
    let mut state = State { observed: Observed::Running, generation: 2, ..State::NEW };
    let mut seen = Vec::new();
    for (desired, fact) in [
        // By itself, and back.
        (Desired::Running, report(HostState::Pausing, 3)),
        (Desired::Running, report(HostState::Paused, 4)),
        (Desired::Running, report(HostState::Resuming, 5)),
        (Desired::Running, report(HostState::Running, 6)),
        // On request: the wish shows before the host has heard it.
        (Desired::Paused, report(HostState::Running, 6)),
        (Desired::Paused, report(HostState::Pausing, 7)),
        (Desired::Paused, report(HostState::Paused, 8)),
        (Desired::Paused, report(HostState::Running, 6)),
        (Desired::Paused, Event::Absent),
        (Desired::Paused, report(HostState::Paused, 8)),
        (Desired::Stopped, report(HostState::Paused, 8)),
        (Desired::Stopped, Event::Destroyed),
    ] {
        state = State { desired, ..state };
        state = observe(state, fact).unwrap_or(state);
        seen.push(word(state));
    }
    use Status::*;
    assert_eq!(
        seen,
        [Pausing, Paused, Resuming, Running, Pausing, Pausing, Paused, Paused, Missing, Paused, Stopping, Stopped]
    );
}

#[test]
fn what_was_uploaded_outlives_its_host() {
    let report = |state, generation| Event::Reported { state, generation };
    let mut state = State { desired: Desired::Paused, observed: Observed::Pausing, generation: 2 };
    let mut seen = Vec::new();
    for fact in [
        report(HostState::Uploaded, 4),
        Event::Absent,
        Event::Absent,
        report(HostState::Running, 5),
        report(HostState::Uploaded, 6),
        report(HostState::Hibernated, 8),
        Event::Absent,
    ] {
        state = observe(state, fact).unwrap_or(state);
        seen.push(status(Desired::Running, state.observed));
    }
    use Status::*;
    assert_eq!(seen, [Paused, Hibernated, Hibernated, Running, Paused, Hibernated, Hibernated]);

    // It is on no host, and still it takes one to end it.
    let unwanted = State { desired: Desired::Stopped, ..state };
    assert_eq!(observe(unwanted, Event::Absent), None);
    for on_host in [None, Some(HostState::Hibernated)] {
        assert_eq!(reconcile(unwanted, Origin::Fork, on_host, Duration::ZERO), Action::Destroy);
        assert_eq!(reconcile(state, Origin::Fork, on_host, FORK_GRACE), Action::Nothing);
    }
    // One that ended elsewhere is forgotten where it hibernated, once its owner does not want it any more.
    let stopped = State { observed: Observed::Stopped, ..unwanted };
    assert_eq!(reconcile(stopped, Origin::Fork, Some(HostState::Hibernated), Duration::ZERO), Action::Destroy);
    assert_eq!(reconcile(stopped, Origin::Fork, None, Duration::ZERO), Action::Nothing);
    let failed = State { observed: Observed::Failed, ..state };
    assert_eq!(reconcile(failed, Origin::Fork, Some(HostState::Hibernated), FORK_GRACE), Action::Nothing);
}

#[test]
fn a_lost_request_is_made_again_only_after_a_while() {
    let again = |state, on_host, age| reconcile(state, Origin::Template, on_host, age);
    assert_eq!(again(State::NEW, None, Duration::ZERO), Action::Nothing);
    assert_eq!(again(State::NEW, None, GRACE), Action::Create);
    let missing = State { observed: Observed::Missing, ..State::NEW };
    assert_eq!(
        again(missing, None, GRACE),
        Action::Nothing,
        "what ran once is not started over behind its owner's back"
    );

    let asked = State { desired: Desired::Paused, observed: Observed::Running, generation: 2 };
    assert_eq!(again(asked, Some(HostState::Running), Duration::ZERO), Action::Nothing);
    assert_eq!(again(asked, Some(HostState::Running), GRACE), Action::Pause);
    let auto_paused = State { observed: Observed::Paused, ..State::NEW };
    assert_eq!(
        again(auto_paused, Some(HostState::Paused), GRACE),
        Action::Nothing,
        "it is resumed when it is asked for"
    );
}

#[test]
fn a_lost_fork_is_given_up() {
    assert_eq!(reconcile(State::NEW, Origin::Fork, None, GRACE), Action::Nothing);
    assert_eq!(reconcile(State::NEW, Origin::Fork, None, FORK_GRACE), Action::GiveUp);
    assert_eq!(reconcile(State::NEW, Origin::Fork, Some(HostState::Starting), FORK_GRACE), Action::Nothing);
}

#[test]
fn what_failed_to_start_but_runs_is_ended() {
    let failed = observe(State::NEW, Event::StartFailed).unwrap();
    assert_eq!(word(failed), Status::Error);
    assert_eq!(reconcile(failed, Origin::Template, Some(HostState::Running), Duration::ZERO), Action::Destroy);
    assert_eq!(word(State { desired: Desired::Stopped, ..failed }), Status::Stopped);
}
