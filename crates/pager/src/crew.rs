//! The threads that serve: one reader, a few helpers, and the work between them.

use std::collections::VecDeque;
use std::num::NonZero;
use std::ops::Range;
use std::os::fd::{AsFd as _, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use crate::bitmap::Bitmap;
use crate::fill::{Guest, PIECE, Step, Why};
use crate::working_set::{Recorder, WorkingSet};
use crate::{CHUNK, Ended, Error, HUGE_PAGE, PAGE};

/// Helpers at most. More would wait for each other in the kernel.
const HELPERS: usize = 3;

/// Pages that are waited for at the same time, where they come from elsewhere.
const FETCHERS: usize = 4;

/// The threads call nothing deep; what is touched of a stack stays with the process.
const STACK: usize = 128 << 10;

/// Fetching calls whatever it takes to reach an object store.
const FETCH_STACK: usize = 2 << 20;

/// A helper without work for so long gives its memory back.
const IDLE: Duration = Duration::from_secs(1);

/// A removal takes microseconds. After so many tries in vain they are further apart.
const MANY_BUSY: u32 = 1000;
const BUSY_PAUSE: Duration = Duration::from_millis(1);

/// How often, and how long apart, a page that somebody waits for is tried while there is no memory.
const TRIES: u32 = 500;
const PAUSE: Duration = Duration::from_millis(10);

/// What the threads share.
pub struct Crew {
    pub guest: Guest,
    work: Mutex<Work>,
    /// Chunks that were filled ahead, or are about to be.
    begun: Bitmap,
    /// There is work for helpers.
    more: Condvar,
    /// There is work for fetchers.
    absent: Condvar,
    /// While there is one, faults are recorded.
    recorder: Mutex<Option<Recorder>>,
    /// How often in a row a removal was in the way.
    busy: AtomicU32,
    /// Somebody has noticed that the kernel could serve what is left.
    is_whole: AtomicBool,
    outcome: Mutex<Option<Result<Ended, Error>>>,
    /// Readable once there is an outcome.
    ended: OwnedFd,
}

#[derive(Default)]
struct Work {
    /// Pages that somebody waits for.
    faults: VecDeque<u64>,
    /// Chunks around those. Each is here once in its life, so they cannot be many.
    ahead: Vec<Range<u64>>,
    /// What was needed last time.
    prefetch: VecDeque<Range<u64>>,
    /// What has to be fetched before it can be filled.
    absent: Vec<Task>,
    is_over: bool,
}

/// In the order of their urgency.
enum Task {
    Fault(u64),
    Ahead(Range<u64>),
    Prefetch(Range<u64>),
}

impl Crew {
    /// Starts the threads. They hold on to what is returned until they notice that there is an outcome.
    pub fn start(guest: Guest, fetch: Option<&WorkingSet>, recorder: Option<Recorder>) -> Result<Arc<Self>, Error> {
        let set_up = |e: Errno| Error::SetUp(e.into());
        let ended = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(set_up)?;
        let prefetch = fetch.iter().flat_map(|fetch| fetch.ranges()).flat_map(pieces).collect();
        let crew = Arc::new(Self {
            work: Mutex::new(Work { prefetch, ..Work::default() }),
            begun: Bitmap::new(guest.memory_size().div_ceil(CHUNK)),
            more: Condvar::new(),
            absent: Condvar::new(),
            recorder: Mutex::new(recorder),
            busy: AtomicU32::new(0),
            is_whole: AtomicBool::new(false),
            outcome: Mutex::new(None),
            guest,
            ended,
        });
        let processors = thread::available_parallelism().map_or(1, NonZero::get);
        let spawn = |name: &str, stack, run: fn(&Self) -> Result<(), Error>| {
            let crew = Arc::clone(&crew);
            let thread = thread::Builder::new().name(name.to_owned()).stack_size(stack);
            thread.spawn(move || {
                // Faults that nobody serves any more would be waited for for ever.
                let outcome = catch_unwind(AssertUnwindSafe(|| run(&crew)));
                if let Err(error) = outcome.unwrap_or(Err(Error::Panicked)) {
                    crew.end(Err(error));
                }
            })
        };
        let spawned = spawn("reader", STACK, Self::read);
        let spawned = spawned
            .and_then(|_| (0..processors.min(HELPERS)).try_for_each(|_| spawn("helper", STACK, Self::help).map(drop)));
        let fetchers = if crew.guest.is_lazy() { FETCHERS } else { 0 };
        let spawned =
            spawned.and_then(|()| (0..fetchers).try_for_each(|_| spawn("fetcher", FETCH_STACK, Self::fetch).map(drop)));
        if let Err(error) = spawned {
            crew.end(Ok(Ended::Stopped));
            return Err(Error::SetUp(error));
        }
        Ok(crew)
    }

    /// Stops everything, with the first outcome that is named.
    pub fn end(&self, outcome: Result<Ended, Error>) {
        lock(&self.outcome).get_or_insert(outcome);
        lock(&self.work).is_over = true;
        self.more.notify_all();
        self.absent.notify_all();
        // Fails when it was written to often, which it was not.
        let _ = rustix::io::write(&self.ended, &1_u64.to_ne_bytes());
    }

    /// Something to poll for the end.
    pub fn ended(&self) -> PollFd<'_> {
        PollFd::new(&self.ended, PollFlags::IN)
    }

    /// What it ended with, once.
    pub fn outcome(&self) -> Option<Result<Ended, Error>> {
        lock(&self.outcome).take()
    }

    /// Stops recording. What was recorded, the first time.
    pub fn recorded(&self) -> Option<Recorder> {
        lock(&self.recorder).take()
    }

    /// The reader: sleeps until there are faults, and serves them.
    fn read(&self) -> Result<(), Error> {
        let (mut faults, mut buffer) = (Vec::new(), Vec::new());
        loop {
            let uffd = self.guest.uffd.as_fd();
            let mut ready = [PollFd::new(&uffd, PollFlags::IN), self.ended()];
            match poll(&mut ready, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(Error::Events(error.into())),
            }
            if !ready[1].revents().is_empty() {
                return Ok(());
            }
            loop {
                self.guest.take_events(&mut faults)?;
                self.missed(&mut faults);
                let task = lock(&self.work).take_urgent();
                let Some(task) = task else { break };
                self.run(task, &mut buffer)?;
            }
        }
    }

    /// A helper: does what the reader has no time for, and what nobody waits for.
    fn help(&self) -> Result<(), Error> {
        let mut buffer = Vec::new();
        while let Some(task) = self.next(&mut buffer) {
            self.run(task, &mut buffer)?;
        }
        Ok(())
    }

    /// A fetcher: waits for what is not in the snapshot's files, and has it filled then.
    fn fetch(&self) -> Result<(), Error> {
        loop {
            let mut work = lock(&self.work);
            let task = loop {
                if work.is_over {
                    return Ok(());
                }
                // First what somebody waits for.
                let is_fault = |task: &Task| matches!(task, Task::Fault(_));
                let first = work.absent.iter().position(is_fault).unwrap_or_default();
                if first < work.absent.len() {
                    break work.absent.remove(first);
                }
                work = self.absent.wait(work).unwrap_or_else(PoisonError::into_inner);
            };
            drop(work);
            let range = match &task {
                Task::Fault(offset) => *offset..*offset + PAGE,
                Task::Ahead(range) | Task::Prefetch(range) => range.clone(),
            };
            match (self.guest.fetch(range), &task) {
                (Ok(()), _) => {}
                (Err(error), Task::Fault(_)) => return Err(error),
                // Nobody waits for it; who does one day is told then.
                (Err(_), Task::Ahead(_) | Task::Prefetch(_)) => continue,
            }
            lock(&self.work).put_back(task);
            self.more.notify_one();
        }
    }

    fn next(&self, buffer: &mut Vec<u8>) -> Option<Task> {
        let mut work = lock(&self.work);
        loop {
            if work.is_over {
                return None;
            }
            if let Some(task) = work.take_urgent().or_else(|| work.prefetch.pop_front().map(Task::Prefetch)) {
                return Some(task);
            }
            if buffer.is_empty() {
                work = self.more.wait(work).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let waited;
            (work, waited) = self.more.wait_timeout(work, IDLE).unwrap_or_else(PoisonError::into_inner);
            if waited.timed_out() {
                // It may be for long.
                *buffer = Vec::new();
            }
        }
    }

    /// Puts the faults in the queue.
    fn missed(&self, faults: &mut Vec<u64>) {
        if faults.is_empty() {
            return;
        }
        if let Some(recorder) = &mut *lock(&self.recorder) {
            faults.iter().for_each(|offset| recorder.missed(*offset));
        }
        let mut work = lock(&self.work);
        work.faults.extend(faults.drain(..));
        // The reader takes one of them itself.
        if work.faults.len() > 1 {
            self.more.notify_one();
        }
    }

    fn run(&self, task: Task, buffer: &mut Vec<u8>) -> Result<(), Error> {
        let step = match &task {
            Task::Fault(offset) => self.serve(*offset, buffer)?,
            Task::Ahead(range) | Task::Prefetch(range) => self.guest.fill(range.clone(), Why::Ahead, buffer)?,
        };
        match (step, task) {
            (Step::Done, task) => {
                self.busy.store(0, Ordering::Relaxed);
                if let Task::Fault(offset) = task {
                    self.ahead_of(offset);
                }
            }
            (Step::Busy, task) => {
                lock(&self.work).put_back(task);
                // The reader has to read the removal, or the VMM to go on with it; it may be stopped in the middle of it.
                if self.busy.fetch_add(1, Ordering::Relaxed) < MANY_BUSY {
                    thread::yield_now();
                } else {
                    thread::park_timeout(BUSY_PAUSE);
                }
            }
            (Step::Absent, task) => {
                lock(&self.work).absent.push(task);
                self.absent.notify_one();
            }
            // What nobody waits for may be missing.
            (Step::NoMemory, Task::Ahead(_)) => {}
            (Step::NoMemory, Task::Prefetch(_)) => lock(&self.work).prefetch.clear(),
            (Step::NoMemory, Task::Fault(offset)) => return Err(Error::NoMemory(offset)),
            (Step::Gone, _) => self.end(Ok(Ended::VmmGone)),
        }
        if self.guest.is_whole() && !self.is_whole.swap(true, Ordering::Relaxed) && self.guest.release()? {
            self.end(Ok(Ended::Whole));
        }
        Ok(())
    }

    /// Fills the page that somebody waits for. While there is no memory for it the kernel may be making some, at worst by
    /// killing the VMM.
    fn serve(&self, offset: u64, buffer: &mut Vec<u8>) -> Result<Step, Error> {
        // Its page may be a huge one, which is filled whole.
        let page = offset..offset + PAGE;
        let mut step = self.guest.fill(page.clone(), Why::Fault, buffer)?;
        for _ in 0..TRIES {
            if step != Step::NoMemory || lock(&self.work).is_over {
                break;
            }
            thread::park_timeout(PAUSE);
            step = self.guest.fill(page.clone(), Why::Fault, buffer)?;
        }
        Ok(step)
    }

    /// What is around the page is wanted soon.
    fn ahead_of(&self, offset: u64) {
        let huge = |region: &crate::handshake::Region| region.page_size == HUGE_PAGE;
        if self.guest.regions.at_offset(offset).is_none_or(huge) {
            return;
        }
        let chunk = offset / CHUNK;
        if self.begun.set(chunk..chunk + 1) == 0 {
            return;
        }
        let range = chunk * CHUNK..((chunk + 1) * CHUNK).min(self.guest.memory_size());
        let mut work = lock(&self.work);
        work.ahead.push(range);
        // The reader does the last one itself if nothing else comes.
        if work.ahead.len() > 1 {
            self.more.notify_one();
        }
    }
}

impl Work {
    fn take_urgent(&mut self) -> Option<Task> {
        let fault = self.faults.pop_front().map(Task::Fault);
        fault.or_else(|| self.ahead.pop().map(Task::Ahead))
    }

    fn put_back(&mut self, task: Task) {
        match task {
            Task::Fault(offset) => self.faults.push_front(offset),
            Task::Ahead(range) => self.ahead.push(range),
            Task::Prefetch(range) => self.prefetch.push_front(range),
        }
    }
}

/// A long range in parts, between which there is time for what is more urgent.
fn pieces(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let Range { start, end } = range;
    (start..end).step_by(PIECE as usize).map(move |at| at..end.min(at + PIECE))
}

/// What a thread that panicked left is whole: nothing here is changed in more than one step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
