//! What people see. Results go to standard output, everything else to standard error; colours and moving things only to a
//! terminal.

use std::io::{self, IsTerminal, Write};
use std::path::Path;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// A colour or weight of the terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    Bold,
    Dim,
    Red,
    Green,
    Yellow,
}

/// Dresses texts for one stream, or leaves them as they are.
#[derive(Debug, Clone, Copy)]
pub struct Paint {
    on: bool,
}

impl Paint {
    /// For standard output.
    pub fn stdout() -> Self {
        Self { on: io::stdout().is_terminal() && colours_wanted() }
    }

    fn stderr() -> Self {
        Self { on: io::stderr().is_terminal() && colours_wanted() }
    }

    /// `text` in `style`.
    pub fn paint(self, style: Style, text: &str) -> String {
        let code = match style {
            Style::Bold => 1,
            Style::Dim => 2,
            Style::Red => 31,
            Style::Green => 32,
            Style::Yellow => 33,
        };
        if self.on { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// See no-color.org.
fn colours_wanted() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Writes a line to standard output.
pub fn print(line: &str) -> io::Result<()> {
    writeln!(io::stdout().lock(), "{line}")
}

/// Writes a value as one line of JSON to standard output.
pub fn print_json(value: &impl Serialize) -> io::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, value)?;
    out.write_all(b"\n")
}

/// Tells an error and its causes on standard error.
pub fn error(error: &anyhow::Error) {
    // A reader of our output that has had enough is not a failure worth words, nor is there anyone to read them.
    if error.root_cause().downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe) {
        return;
    }
    let word = Paint::stderr().paint(Style::Red, "error:");
    let _ = writeln!(io::stderr().lock(), "{word} {error:#}");
}

/// What a long command is doing: a moving line on a terminal, plain lines elsewhere.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    json: bool,
}

impl Progress {
    /// `json` is how the result will be told; progress is for people either way.
    pub fn new(json: bool) -> Self {
        let bar = io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            // The template is a constant that is known to be good.
            if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed:>3} {wide_msg}") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(std::time::Duration::from_millis(100));
            bar
        });
        Self { bar, json }
    }

    /// Says what is being done now.
    pub fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(line.to_owned()),
            None => drop(writeln!(io::stderr().lock(), "{line}")),
        }
    }

    /// Says it on a terminal, and only there: for what is over soon.
    pub fn show(&self, line: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(line.to_owned());
        }
    }

    /// Ends the progress with its result: `value` as JSON, or where the API is, how to use it, and whom to trust.
    pub fn ready(&self, value: &impl Serialize, url: &str, api_key: &str, ca: Option<&Path>) -> io::Result<()> {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        if self.json {
            return print_json(value);
        }
        let paint = Paint::stdout();
        print(&format!("{} at {}", paint.paint(Style::Green, "Wrenn is ready"), paint.paint(Style::Bold, url)))?;
        print("")?;
        print(&format!("  export WRENN_BASE_URL={url}"))?;
        print(&format!("  export WRENN_API_KEY={api_key}"))?;
        if let Some(ca) = ca {
            // Python's and most others'; Requests'; Node's, which would keep its own beside it.
            for variable in ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS"] {
                print(&format!("  export {variable}={}", ca.display()))?;
            }
        }
        print("")?;
        print("  wrenn capsule create        # on this machine, without the lines above")?;
        print(&paint.paint(Style::Dim, "  ctrl-C ends it; the next `wrenn up` has its capsules again"))
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Ctrl-C and SIGTERM, which end this process no more once this was made: that has to be before anybody is told that there is
/// something to interrupt.
pub struct Interrupts {
    interrupt: Signal,
    terminate: Signal,
}

impl Interrupts {
    pub fn listen() -> io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    /// Resolves at the next one.
    pub async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
