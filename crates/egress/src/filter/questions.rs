//! Questions: judged, asked by the host, and remembered with their answers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;

use super::{PAUSE, Shared, accept};
use crate::dns::{self, Verdict};

/// Questions of one capsule that may be under way; a datagram more is dropped, and asked again by its guest.
const QUESTIONS: usize = 64;
/// Connections with questions; more of them wait.
const STREAMS: usize = 16;
/// For a guest to send a question over its connection.
const IDLE: Duration = Duration::from_secs(10);
/// Bytes of a question. Names end at 255.
const BYTES: usize = 1024;

/// Answers datagrams for as long as it is polled.
pub(super) async fn datagrams(socket: UdpSocket, shared: &Arc<Shared>) {
    let (socket, room) = (Arc::new(socket), Arc::new(Semaphore::new(QUESTIONS)));
    let mut buffer = [0; BYTES];
    loop {
        let Ok((length, guest)) = socket.recv_from(&mut buffer).await else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let Ok(permit) = room.clone().try_acquire_owned() else { continue };
        let (shared, socket, message) = (shared.clone(), socket.clone(), buffer[..length].to_vec());
        tokio::spawn(async move {
            let _permit = permit;
            if let Some(answer) = answer(&message, &shared, true).await {
                // A guest that does not get it asks again.
                let _ = socket.send_to(&answer, guest).await;
            }
        });
    }
}

/// Answers questions over connections for as long as it is polled.
pub(super) async fn streams(listener: TcpListener, shared: &Arc<Shared>) {
    let serve = |guest| {
        let shared = shared.clone();
        // It ends when the guest ends it, says nothing for a while, or what is no question.
        async move { drop(stream(guest, &shared).await) }
    };
    accept(listener, STREAMS, serve).await;
}

async fn stream(mut guest: TcpStream, shared: &Shared) -> std::io::Result<()> {
    let mut message = [0; BYTES];
    loop {
        let question = async {
            let length = usize::from(guest.read_u16().await?);
            let room = message.get_mut(..length).ok_or(std::io::ErrorKind::InvalidData)?;
            guest.read_exact(room).await?;
            std::io::Result::Ok(length)
        };
        let length = tokio::time::timeout(IDLE, question).await??;
        let Some(answer) = answer(&message[..length], shared, false).await else { return Ok(()) };
        let length = u16::try_from(answer.len()).map_err(std::io::Error::other)?;
        let answer = [&length.to_be_bytes(), &answer[..]].concat();
        tokio::time::timeout(IDLE, guest.write_all(&answer)).await??;
    }
}

/// What the guest is answered, if anything.
async fn answer(message: &[u8], shared: &Shared, over_udp: bool) -> Option<Vec<u8>> {
    match dns::judge(message, &shared.policy()) {
        Verdict::Ignore => None,
        Verdict::Answer(answer) => Some(answer),
        Verdict::Ask(question) => {
            let answer = shared.resolver.ask(question, over_udp).await?;
            // The list may be another by now.
            if !answer.addresses.is_empty() && shared.policy().allows_name(&answer.name) {
                let (mut answers, now) = (shared.answers(), Instant::now());
                for (address, ttl) in &answer.addresses {
                    answers.tell(&answer.name, *address, *ttl, now);
                }
            }
            Some(answer.bytes)
        }
    }
}
