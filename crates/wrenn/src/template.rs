//! `wrenn template`: what capsules are made from, over the REST API. `wrenn capsule snapshot` makes them.

use std::process::ExitCode;

use anyhow::{Context, Result};
use api::{Template, TemplateKind};
use clap::{Args, Subcommand};

use crate::rest::{Client, Server};
use crate::terminal::{self, Paint, Style};

/// Lists and removes templates.
#[derive(Debug, Args)]
#[command(visible_alias = "templates")]
pub struct TemplateCommand {
    #[command(flatten)]
    server: Server,
    /// Print results as JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Lists templates.
    #[command(visible_alias = "ls")]
    List {
        /// Print names only.
        #[arg(short, long)]
        quiet: bool,
    },
    /// Removes templates. Capsules that were made from them are not touched.
    Rm {
        /// The templates.
        #[arg(required = true)]
        names: Vec<String>,
    },
}

impl TemplateCommand {
    pub(crate) async fn run(self) -> Result<ExitCode> {
        let client = self.server.client()?;
        match self.verb {
            Verb::List { quiet } => list(&client, self.json, quiet).await,
            Verb::Rm { names } => remove(&client, self.json, names).await,
        }
    }
}

async fn list(client: &Client, json: bool, quiet: bool) -> Result<ExitCode> {
    let templates = client.templates().await?;
    if json {
        terminal::print_json(&templates)?;
    } else if quiet {
        for template in &templates {
            terminal::print(&template.name)?;
        }
    } else {
        print_table(&templates)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn print_table(templates: &[Template]) -> std::io::Result<()> {
    let wide = templates.iter().map(|template| template.name.len()).max().unwrap_or(0).max("NAME".len());
    let header = format!("{:<wide$}  {:<8}  {:>5}  {:>9}  {:>9}  CREATED", "NAME", "TYPE", "VCPUS", "MEMORY", "DISK");
    terminal::print(&Paint::stdout().paint(Style::Bold, &header))?;
    for template in templates {
        let kind = match template.kind {
            TemplateKind::Base => "base",
            TemplateKind::Snapshot => "snapshot",
        };
        terminal::print(&format!(
            "{:<wide$}  {kind:<8}  {:>5}  {:>5} MiB  {:>5} MiB  {}",
            template.name,
            template.vcpus,
            template.memory_mb,
            template.disk_size_mb,
            template.created_at.to_rfc3339(),
        ))?;
    }
    Ok(())
}

async fn remove(client: &Client, json: bool, names: Vec<String>) -> Result<ExitCode> {
    let (mut removed, mut code) = (Vec::new(), ExitCode::SUCCESS);
    for name in names {
        match client.delete_template(&name).await.with_context(|| format!("cannot remove {name}")) {
            Ok(()) => removed.push(name),
            Err(error) => {
                terminal::error(&error);
                code = ExitCode::FAILURE;
            }
        }
    }
    if json {
        terminal::print_json(&removed)?;
    } else {
        for name in removed {
            terminal::print(&name)?;
        }
    }
    Ok(code)
}
