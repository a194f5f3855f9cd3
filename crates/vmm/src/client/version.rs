//! Which versions of the API there are, and what each of them knows.

use std::fmt;
use std::str::FromStr;

use super::Error;

/// A VMM's version. What follows the third number (`-dev`) is ignored: such a build knows what its release will know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number.
    pub patch: u32,
}

impl Version {
    /// The first version with network overrides on load, without which a snapshot cannot be cloned.
    pub const OLDEST: Self = Self::new(1, 12, 0);

    const fn new(major: u32, minor: u32, patch: u32) -> Self {
        Self { major, minor, patch }
    }

    /// Whether this version has `feature`.
    pub fn has(self, feature: Feature) -> bool {
        self >= feature.since()
    }

    /// Refuses a feature that this version lacks.
    pub(super) fn require(self, feature: Feature) -> Result<(), Error> {
        if self.has(feature) {
            return Ok(());
        }
        Err(Error::Unsupported { feature, since: feature.since(), found: self })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

impl FromStr for Version {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let numbers = text.split_once(['-', '+']).map_or(text, |(numbers, _)| numbers);
        let mut parts = numbers.split('.').map(|part| part.parse().ok());
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(Some(major)), Some(Some(minor)), Some(Some(patch)), None) => Ok(Self::new(major, minor, patch)),
            _ => Err(Error::Version(text.to_owned())),
        }
    }
}

/// What came after [`Version::OLDEST`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Feature {
    /// `track_dirty_pages` on load, formerly called `enable_diff_snapshots`.
    TrackDirtyPagesOnLoad,
    /// Setting the guest's clock to the present on load.
    ClockRealtime,
    /// Another vsock path on load than the one in the snapshot.
    VsockOverride,
    /// Telling the guest an MTU.
    Mtu,
    /// Any number of whole diffs. Before, only the first snapshot that a VMM writes has all that came in by the network: a
    /// later diff lacks what was received into memory that the guest had set aside for it before the last one.
    DiffsOnDiffs,
}

impl Feature {
    /// The first version that has it.
    pub const fn since(self) -> Version {
        match self {
            Self::TrackDirtyPagesOnLoad => Version::new(1, 13, 0),
            Self::DiffsOnDiffs => Version::new(1, 14, 0),
            Self::ClockRealtime | Self::VsockOverride | Self::Mtu => Version::new(1, 16, 0),
        }
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TrackDirtyPagesOnLoad => "`track_dirty_pages` on load",
            Self::ClockRealtime => "`clock_realtime`",
            Self::VsockOverride => "`vsock_override`",
            Self::Mtu => "`mtu`",
            Self::DiffsOnDiffs => "a diff on a diff",
        })
    }
}
