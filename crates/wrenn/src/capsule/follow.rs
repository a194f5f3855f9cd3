//! A command's output as it comes: the messages of `exec/stream` and `processes/{selector}/stream`.

use std::time::Duration;

use anyhow::{Context, Error, Result, anyhow};
use api::stream::{Answer, Request};
use api::{ErrorCode, ErrorDetail};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use tokio::sync::{mpsc, watch};
use tokio::time::{interval, timeout};
use tokio_tungstenite::tungstenite::Message;

use super::stdio::Output;
use crate::rest::{Refused, Socket};

/// How often a quiet connection is used, and how long the server may stay silent until it counts as broken.
const PING: Duration = Duration::from_secs(20);
const SILENCE: Duration = Duration::from_secs(65);

/// How following a command ended.
pub(super) enum End {
    /// The command ended: with this code, or -1 when by a signal.
    Exited(i32),
    /// The server has something against it.
    Refused(Error),
    /// Nothing came for as long as was waited for.
    Quiet,
    /// The connection is gone; the command goes on.
    Broken(Error),
}

/// Passes a command's output on until it ends, and `typed`, if there is any, to its standard input. `hello` is the first
/// message, where one is needed. With `quiet` it ends when nothing came for so long. `pid` learns which process it is.
pub(super) async fn follow(
    socket: Socket,
    hello: Option<&Request>,
    typed: Option<mpsc::Receiver<Vec<u8>>>,
    quiet: Option<Duration>,
    pid: &watch::Sender<Option<u32>>,
) -> Result<End> {
    let (mut to, mut from) = socket.split();
    if let Some(hello) = hello
        && let Err(error) = to.send(message(hello)).await
    {
        return Ok(End::Broken(error.into()));
    }
    // At once, each at its own pace: who waits to speak must still listen, or both sides would wait for each other.
    tokio::select! {
        end = listen(&mut from, quiet, pid) => end,
        why = speak(&mut to, typed, pid.subscribe()) => Ok(End::Broken(why)),
    }
}

async fn listen(
    from: &mut SplitStream<Socket>,
    quiet: Option<Duration>,
    pid: &watch::Sender<Option<u32>>,
) -> Result<End> {
    let (stdout, stderr) = (Output::stdout(), Output::stderr());
    loop {
        let next = match (timeout(quiet.unwrap_or(SILENCE), from.next()).await, quiet) {
            (Ok(next), _) => next,
            (Err(_), Some(_)) => return Ok(End::Quiet),
            (Err(_), None) => {
                return Ok(End::Broken(anyhow!("the server has been silent for {} seconds", SILENCE.as_secs())));
            }
        };
        let text = match next {
            Some(Ok(Message::Text(text))) => text,
            Some(Ok(Message::Close(_))) | None => return Ok(End::Broken(anyhow!("the server closed it"))),
            Some(Ok(_)) => continue,
            Some(Err(error)) => return Ok(End::Broken(error.into())),
        };
        match serde_json::from_str(&text) {
            Ok(Answer::Start { pid: number }) => drop(pid.send_replace(Some(number))),
            Ok(Answer::Stdout { data }) => stdout.write(bytes(&data)?).await?,
            Ok(Answer::Stderr { data }) => stderr.write(bytes(&data)?).await?,
            Ok(Answer::Exit { exit_code }) => return Ok(End::Exited(exit_code)),
            Ok(Answer::Error { code, data, fatal: true }) => {
                return Ok(End::Refused(Refused::from(ErrorDetail { code, message: data }).into()));
            }
            Ok(Answer::Error { data, .. }) => {
                let line = format!("wrenn: {data}\n");
                stderr.write(line.into()).await?;
            }
            // Of a newer server.
            Err(_) => {}
        }
    }
}

fn bytes(data: &str) -> Result<Bytes> {
    Ok(BASE64_STANDARD.decode(data).context("the command's output came broken")?.into())
}

/// Types, once the process is there to read it, and keeps the connection in use. Why it could not go on.
async fn speak(
    to: &mut SplitSink<Socket, Message>,
    mut typed: Option<mpsc::Receiver<Vec<u8>>>,
    mut pid: watch::Receiver<Option<u32>>,
) -> Error {
    let mut pings = interval(PING);
    let mut ready = false;
    loop {
        let message = tokio::select! {
            piece = next(&mut typed), if ready => match piece {
                Some(bytes) => Message::binary(bytes),
                None => {
                    typed = None;
                    message(&Request::Eof)
                }
            },
            _ = pid.changed(), if !ready => {
                ready = true;
                continue;
            }
            _ = pings.tick() => Message::Ping(Default::default()),
        };
        if let Err(error) = to.send(message).await {
            return error.into();
        }
    }
}

/// The next piece of standard input; never, when there is none to pass on.
async fn next(typed: &mut Option<mpsc::Receiver<Vec<u8>>>) -> Option<Vec<u8>> {
    match typed {
        Some(typed) => typed.recv().await,
        None => std::future::pending().await,
    }
}

fn message(request: &Request) -> Message {
    Message::text(serde_json::to_string(request).expect("a request is plain data"))
}

/// Whether the server means that the command ran too long.
pub(super) fn is_late(error: &Error) -> bool {
    error.downcast_ref::<Refused>().is_some_and(|refused| refused.code == ErrorCode::Timeout)
}
