//! The guest's wall clock, which stands still while the guest is paused.

use rustix::time::{ClockId, Timespec};
use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A clock this far behind the host's is set; less is the way the message took.
const BEHIND: f64 = 0.05;
/// A clock this far ahead is set; going back a little would do more harm than good.
const AHEAD: f64 = 5.0;

/// Sets the clock to the host's, in seconds since the epoch, if it is off. Returns how far it was behind, in seconds.
pub fn follow(host: f64) -> io::Result<f64> {
    correct(host, AHEAD)
}

/// The same for a guest that wakes from a snapshot: nothing in it relies on a clock that only goes forward any more, and
/// one that is ahead is corrected as readily as one that is behind.
pub fn step(host: f64) -> io::Result<f64> {
    correct(host, BEHIND)
}

fn correct(host: f64, ahead: f64) -> io::Result<f64> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs_f64();
    if !is_off(now, host, ahead) {
        return Ok(host - now);
    }
    let time = Duration::try_from_secs_f64(host).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    let time = Timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() };
    rustix::time::clock_settime(ClockId::Realtime, time)?;
    Ok(host - now)
}

fn is_off(now: f64, host: f64, ahead: f64) -> bool {
    host - now > BEHIND || now - host > ahead
}

#[cfg(test)]
mod tests {
    use super::{AHEAD, BEHIND};

    #[test]
    fn only_what_matters_is_corrected() {
        let is_off = |now, host| super::is_off(now, host, AHEAD);
        assert!(!is_off(100.0, 100.0) && !is_off(100.0, 100.04) && !is_off(104.0, 100.0));
        assert!(is_off(100.0, 100.06) && is_off(100.0, 4000.0) && is_off(106.0, 100.0));
        assert!(super::is_off(101.0, 100.0, BEHIND) && !super::is_off(100.01, 100.0, BEHIND));
    }
}
