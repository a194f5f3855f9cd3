//! Pages of a snapshot that are elsewhere.

use std::error::Error;
use std::fmt;
use std::ops::Range;

use snapshot::Id;

/// Why pages did not come.
pub type FetchError = Box<dyn Error + Send + Sync>;

/// Brings what is not in the data files of a snapshot yet. Their heads and checksums are there from the beginning.
pub trait Fetch: Send + Sync + fmt::Debug {
    /// Whether these bytes of a generation's file are there. Once they are they stay.
    fn is_present(&self, generation: Id, bytes: Range<u64>) -> bool;

    /// Waits until they are, for as long as it is worth: a guest waits for them.
    fn fetch(&self, generation: Id, bytes: Range<u64>) -> Result<(), FetchError>;
}
