//! The guest of the conformance suite: its init, and a TCP server of one-line commands on port 7000.
//!
//! Compiled by the suite with plain rustc and packed alone into an initrd, so it uses nothing but std. Its address
//! comes from the kernel's `ip=` argument. An answer is one line, `ok …` or `error …`.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::thread;

const PAGE: usize = 4096;

unsafe extern "C" {
    fn mount(source: *const u8, target: *const u8, kind: *const u8, flags: u64, data: *const u8) -> i32;
    fn reboot(command: i32) -> i32;
}

/// The memory the suite fills and sums.
static MEMORY: Mutex<Vec<u8>> = Mutex::new(Vec::new());

fn main() {
    for (kind, target) in [(c"proc", "/proc"), (c"sysfs", "/sys"), (c"devtmpfs", "/dev")] {
        std::fs::create_dir_all(target).expect("the initrd is writable");
        let path = std::ffi::CString::new(target).expect("no NUL in a constant");
        // SAFETY: three NUL-terminated strings and no data.
        unsafe { mount(kind.as_ptr().cast(), path.as_ptr().cast(), kind.as_ptr().cast(), 0, std::ptr::null()) };
    }
    let listener = TcpListener::bind("0.0.0.0:7000").expect("the port is free");
    let mut console = OpenOptions::new().write(true).open("/dev/console").expect("there is a console");
    writeln!(console, "GUEST READY").expect("the console takes a line");
    for stream in listener.incoming().flatten() {
        thread::spawn(move || serve(stream));
    }
}

fn serve(mut stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let mut lines = BufReader::new(stream.try_clone().expect("a socket can be cloned"));
    let mut line = String::new();
    while lines.read_line(&mut line).is_ok_and(|count| count > 0) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let answer = match words.as_slice() {
            // The two that speak more than a line.
            ["send", count] => send(&mut stream, parse(count)),
            ["receive", count] => receive(&mut lines, parse(count)),
            words => run(words),
        };
        let text = match answer {
            Ok(text) => format!("ok {text}\n"),
            Err(error) => format!("error {error}\n"),
        };
        if stream.write_all(text.as_bytes()).is_err() {
            return;
        }
        line.clear();
    }
    let _ = stream.shutdown(Shutdown::Both);
}

fn run(words: &[&str]) -> std::io::Result<String> {
    match words {
        ["fill", seed, mib] => {
            let mut memory = MEMORY.lock().expect("no thread panics with it");
            memory.resize(parse(mib) as usize * (1 << 20), 0);
            fill(&mut memory, parse(seed));
            Ok(String::new())
        }
        ["poke", page, seed] => {
            let mut memory = MEMORY.lock().expect("no thread panics with it");
            let at = parse(page) as usize * PAGE;
            fill(&mut memory[at..at + PAGE], parse(seed));
            Ok(String::new())
        }
        ["zero", page] => {
            let mut memory = MEMORY.lock().expect("no thread panics with it");
            let at = parse(page) as usize * PAGE;
            memory[at..at + PAGE].fill(0);
            Ok(String::new())
        }
        ["sum"] => Ok(format!("{:016x}", sum(&MEMORY.lock().expect("no thread panics with it")))),
        ["cat", path] => Ok(std::fs::read_to_string(path)?.trim().replace('\n', "\\n")),
        ["list", path] => {
            let mut names = Vec::new();
            for entry in std::fs::read_dir(path)? {
                names.push(entry?.file_name().to_string_lossy().into_owned());
            }
            names.sort();
            Ok(names.join(" "))
        }
        ["disk-write", device, offset, seed, length] => {
            let mut data = vec![0; parse(length) as usize];
            fill(&mut data, parse(seed));
            let file = OpenOptions::new().write(true).open(device)?;
            file.write_all_at(&data, parse(offset))?;
            file.sync_all()?;
            Ok(String::new())
        }
        ["disk-sum", device, offset, length] => {
            std::fs::write("/proc/sys/vm/drop_caches", "3")?;
            let mut data = vec![0; parse(length) as usize];
            File::open(device)?.read_exact_at(&mut data, parse(offset))?;
            Ok(format!("{:016x}", sum(&data)))
        }
        ["disk-size", device] => {
            let name = device.trim_start_matches("/dev/");
            Ok(std::fs::read_to_string(format!("/sys/block/{name}/size"))?.trim().to_owned())
        }
        ["http", method, url, headers @ ..] => http(method, url, headers),
        ["reboot"] => {
            thread::spawn(|| {
                // SAFETY: a system call without memory arguments.
                unsafe { reboot(0x0123_4567) }
            });
            Ok(String::new())
        }
        ["panic"] => {
            std::fs::write("/proc/sysrq-trigger", "c")?;
            Ok(String::new())
        }
        _ => Err(std::io::Error::other("unknown command")),
    }
}

/// Requests a metadata path; headers are `name:value` words. Answers status, headers of interest and body on one line.
fn http(method: &str, path: &str, headers: &[&str]) -> std::io::Result<String> {
    let mut stream = TcpStream::connect("169.254.169.254:80")?;
    let mut request = format!("{method} {path} HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close\r\nContent-Length: 0\r\n");
    for header in headers {
        request.push_str(&header.replacen(':', ": ", 1));
        request.push_str("\r\n");
    }
    request.push_str("\r\n");
    stream.write_all(request.as_bytes())?;
    // The service may leave the connection open: the length says when all is here.
    let mut reader = BufReader::new(stream);
    let (mut status, mut length) = (String::new(), 0);
    reader.read_line(&mut status)?;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = parse(value.trim());
        }
    }
    let mut body = String::new();
    reader.take(length).read_to_string(&mut body)?;
    let status = status.split_whitespace().nth(1).unwrap_or("0");
    Ok(format!("{status} {}", body.replace('\n', "\\n")))
}

fn send(stream: &mut TcpStream, mut left: u64) -> std::io::Result<String> {
    let data = vec![0x5a; 64 << 10];
    while left > 0 {
        let part = left.min(data.len() as u64) as usize;
        stream.write_all(&data[..part])?;
        left -= part as u64;
    }
    Ok(String::new())
}

fn receive(stream: &mut impl Read, count: u64) -> std::io::Result<String> {
    let got = std::io::copy(&mut stream.take(count), &mut std::io::sink())?;
    Ok(got.to_string())
}

fn parse(number: &str) -> u64 {
    number.parse().unwrap_or_default()
}

/// A pattern without two equal pages.
fn fill(memory: &mut [u8], seed: u64) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for word in memory.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
}

fn sum(memory: &[u8]) -> u64 {
    memory.chunks_exact(8).fold(0xcbf2_9ce4_8422_2325, |sum, word| {
        let word = u64::from_le_bytes(word.try_into().expect("chunks of eight"));
        (sum ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(5)
    })
}
