//! The rate of the host's time stamp counter, which is also the guest's.
//!
//! QEMU without KVM gives the guest the host's counter, and `microvm` without ACPI gives it no timer to calibrate the
//! counter against, so the guest is told the rate on its command line.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Long enough that the error of two clock readings, some 50 ns, is a few parts in a million.
const SPAN: Duration = Duration::from_millis(20);

/// Samples per reading; the one least disturbed by the scheduler is used.
const SAMPLES: usize = 16;

/// The counter and the clock at one instant.
#[derive(Clone, Copy)]
pub struct Reading {
    ticks: u64,
    clock: Duration,
}

impl Reading {
    /// Reads both now.
    pub fn now() -> Self {
        let mut best = (u64::MAX, Self { ticks: 0, clock: Duration::ZERO });
        for _ in 0..SAMPLES {
            let before = counter();
            let clock = clock_gettime(ClockId::MonotonicRaw);
            let width = counter().wrapping_sub(before);
            if width < best.0 {
                let seconds = u64::try_from(clock.tv_sec).unwrap_or_default();
                let nanos = u32::try_from(clock.tv_nsec).unwrap_or_default();
                best = (width, Self { ticks: before.wrapping_add(width / 2), clock: Duration::new(seconds, nanos) });
            }
        }
        best.1
    }

    /// The counter's rate in kHz, averaged from this reading to one at least 20 ms later.
    pub async fn rate_khz(self) -> u64 {
        let elapsed = Self::now().clock.saturating_sub(self.clock);
        if let Some(missing) = SPAN.checked_sub(elapsed) {
            tokio::time::sleep(missing + Duration::from_millis(1)).await;
        }
        let later = Self::now();
        let nanos = later.clock.saturating_sub(self.clock).as_nanos().max(1);
        let ticks = u128::from(later.ticks.wrapping_sub(self.ticks));
        u64::try_from((ticks * 1_000_000 + nanos / 2) / nanos).unwrap_or(u64::MAX)
    }
}

/// Whether a guest that runs at `saved` kHz can go on at `here` kHz: clocks would otherwise run visibly wrong.
pub fn compatible(saved: u64, here: u64) -> bool {
    saved.abs_diff(here) <= saved / 1000
}

fn counter() -> u64 {
    // SAFETY: reading the counter has no effect and every x86-64 processor has it.
    unsafe { core::arch::x86_64::_rdtsc() }
}
