//! `wrenn capsule port-forward`.

use std::net::IpAddr;
use std::process::ExitCode;
use std::str::FromStr;

use anyhow::{Context, Result};
use api::CapsuleId;
use clap::Args;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};

use crate::rest::Client;
use crate::terminal::{self, Interrupts};

/// Has ports of this machine lead to ports of a capsule, whatever protocol is spoken there, until ctrl-C.
#[derive(Debug, Args)]
pub(super) struct PortForward {
    /// The capsule.
    id: CapsuleId,
    /// The port here and the port there; one number is both. Port 0 here takes a free one.
    #[arg(required = true, value_name = "[LOCAL:]PORT")]
    ports: Vec<Ports>,
    /// Address to listen on here.
    #[arg(long, default_value = "127.0.0.1")]
    address: IpAddr,
}

#[derive(Debug, Clone, Copy)]
struct Ports {
    here: u16,
    there: u16,
}

impl FromStr for Ports {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.parse::<u16>().map_err(|_| format!("`{text}` is not a port"));
        let (here, there) = text.split_once(':').unwrap_or((text, text));
        let ports = Self { here: number(here)?, there: number(there)? };
        if ports.there == 0 { Err("a capsule's port is at least 1".into()) } else { Ok(ports) }
    }
}

impl PortForward {
    pub(super) async fn run(self, client: &Client) -> Result<ExitCode> {
        let mut interrupts = Interrupts::listen()?;
        for ports in &self.ports {
            let listener = TcpListener::bind((self.address, ports.here))
                .await
                .with_context(|| format!("listening on {}:{}", self.address, ports.here))?;
            terminal::print(&format!("{} leads to port {} of {}", listener.local_addr()?, ports.there, self.id))?;
            tokio::spawn(serve(listener, client.clone(), self.id, ports.there));
        }
        interrupts.next().await;
        Ok(ExitCode::SUCCESS)
    }
}

async fn serve(listener: TcpListener, client: Client, id: CapsuleId, port: u16) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let client = client.clone();
                tokio::spawn(async move {
                    if let Err(error) = carry(stream, &client, id, port).await {
                        terminal::error(&error);
                    }
                });
            }
            Err(error) => terminal::error(&anyhow::Error::new(error).context("accepting a connection")),
        }
    }
}

/// Carries one connection to its end, each direction closing by itself.
async fn carry(mut here: TcpStream, client: &Client, id: CapsuleId, port: u16) -> Result<()> {
    here.set_nodelay(true)?;
    let mut there = client.tcp(id, port).await.with_context(|| format!("port {port} of {id}"))?;
    // One that breaks off is its ends' own matter.
    let _ = copy_bidirectional(&mut here, &mut there).await;
    Ok(())
}
