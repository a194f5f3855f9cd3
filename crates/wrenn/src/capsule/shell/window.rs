//! The user's terminal: its size and its mode.

use std::io::{IsTerminal, stdin, stdout};

use anyhow::{Context, Result};
use api::pty::Size;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// Where this process reads from and writes to.
pub(super) struct Window {
    terminal: bool,
}

impl Window {
    pub(super) fn of_this_process() -> Self {
        Self { terminal: stdin().is_terminal() && stdout().is_terminal() }
    }

    /// Whether someone sits in front of it.
    pub(super) fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// Its size; the usual one when it has none.
    pub(super) fn size(&self) -> Size {
        let found = self.terminal.then(|| tcgetwinsize(stdout()).ok()).flatten();
        match found {
            Some(size) if size.ws_col > 0 && size.ws_row > 0 => Size { cols: size.ws_col, rows: size.ws_row },
            _ => Size::default(),
        }
    }

    /// Passes every key on as it is, until the guard is dropped. `None` when there is no terminal.
    pub(super) fn raw(&self) -> Result<Option<Raw>> {
        if !self.terminal {
            return Ok(None);
        }
        let before = tcgetattr(stdin()).context("reading the terminal's mode")?;
        let mut raw = before.clone();
        raw.make_raw();
        // Now, without a flush: what was typed already is for the shell too.
        tcsetattr(stdin(), OptionalActions::Now, &raw).context("changing the terminal's mode")?;
        Ok(Some(Raw(before)))
    }
}

/// While this lives, the terminal is raw.
pub(super) struct Raw(Termios);

impl Drop for Raw {
    fn drop(&mut self) {
        // A terminal that is gone needs no mode.
        let _ = tcsetattr(stdin(), OptionalActions::Now, &self.0);
    }
}
