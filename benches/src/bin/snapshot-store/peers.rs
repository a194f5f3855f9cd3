//! What ours is compared with.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use snapshot::PAGE_SIZE;

use super::guest::Guest;
use super::ours::{READS, STRIDE};
use super::table::Pause;

/// Writes the dirty pages back to back and makes them durable.
pub fn floor(dir: &Path, guest: &Guest) -> Result<Pause> {
    let path = dir.join("floor");
    let bytes: Vec<u8> = guest.dirty.iter().flat_map(|page| guest.page(*page)).copied().collect();
    let start = Instant::now();
    let mut file = File::create(&path)?;
    for part in bytes.chunks(1 << 20) {
        file.write_all(part)?;
    }
    file.sync_all()?;
    File::open(dir)?.sync_all()?;
    let time = start.elapsed();
    fs::remove_file(path)?;
    Ok(Pause { time, bytes: bytes.len() as u64 })
}

/// Compresses the whole sparse file.
pub fn zstd(dir: &Path, guest: &Guest) -> Result<Pause> {
    let path = dir.join("diff.zst");
    let start = Instant::now();
    run(Command::new("zstd").args(["-1", "-q", "-T0", "-f"]).arg(guest.diff()).arg("-o").arg(&path), &[])?;
    File::open(&path)?.sync_all()?;
    let time = start.elapsed();
    let bytes = path.metadata()?.len();
    fs::remove_file(path)?;
    Ok(Pause { time, bytes })
}

/// A chain of images, one for each pause.
pub struct Qcow2 {
    dir: PathBuf,
    size: u64,
    images: u32,
    /// What a pause of one page takes: the programs' own start and two syncs.
    overhead: Duration,
}

impl Qcow2 {
    pub fn create(dir: &Path, guest: &Guest) -> Result<Self> {
        let mut chain = Self { dir: dir.join("qcow2"), size: guest.size(), images: 0, overhead: Duration::ZERO };
        fs::create_dir(&chain.dir)?;
        let mut times = Vec::new();
        for _ in 0..5 {
            times.push(chain.write(&guest.dirty[..1])?.time);
            fs::remove_file(chain.image(chain.images - 1))?;
            chain.images -= 1;
        }
        times.sort();
        chain.overhead = times[times.len() / 2];
        Ok(chain)
    }

    pub fn pause(&mut self, guest: &Guest) -> Result<Pause> {
        let pause = self.write(&guest.dirty)?;
        Ok(Pause { time: pause.time.saturating_sub(self.overhead), ..pause })
    }

    fn image(&self, number: u32) -> PathBuf {
        self.dir.join(format!("{number}.qcow2"))
    }

    fn write(&mut self, dirty: &[u32]) -> Result<Pause> {
        let image = self.image(self.images);
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k"]);
        if self.images > 0 {
            create.args(["-F", "qcow2", "-b"]).arg(self.image(self.images - 1));
        }
        create.arg(&image).arg(self.size.to_string());
        // Runs of pages are one write each, with a pattern: qemu-io takes no data in one process with many writes.
        let mut script = String::new();
        let mut pages = dirty.iter().copied().peekable();
        while let Some(first) = pages.next() {
            let mut count = 1_u64;
            while pages.next_if_eq(&(first + count as u32)).is_some() {
                count += 1;
            }
            script += &format!("write -q -P 0x5a {} {}\n", u64::from(first) * PAGE_SIZE, count * PAGE_SIZE);
        }
        script += "flush\n";
        let start = Instant::now();
        run(&mut create, &[])?;
        run(Command::new("qemu-io").args(["-f", "qcow2", "-t", "writeback"]).arg(&image), script.as_bytes())?;
        File::open(&image)?.sync_all()?;
        let time = start.elapsed();
        self.images += 1;
        Ok(Pause { time, bytes: image.metadata()?.blocks() * 512 })
    }

    /// Time of one read of a page through the newest image, one after the other, from the page cache.
    pub fn read(&self) -> Result<Duration> {
        let mut bench = Command::new("qemu-img");
        bench.args(["bench", "-f", "qcow2", "-t", "writeback", "-d", "1"]);
        bench.args(["-c", &READS.to_string(), "-s", &PAGE_SIZE.to_string(), "-S", &(STRIDE * PAGE_SIZE).to_string()]);
        let out = run(bench.arg(self.image(self.images - 1)), &[])?;
        let seconds = out.rsplit_once("completed in ").and_then(|(_, rest)| rest.split_once(' '));
        let seconds: f64 = seconds.with_context(|| format!("qemu-img bench said: {out}"))?.0.parse()?;
        Ok(Duration::from_secs_f64(seconds / READS as f64))
    }
}

/// Runs a program to its end and gives back what it printed.
fn run(command: &mut Command, input: &[u8]) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("run {name}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input)?;
    }
    let out = child.wait_with_output()?;
    ensure!(out.status.success(), "{name} failed: {}", String::from_utf8_lossy(&out.stderr));
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}
