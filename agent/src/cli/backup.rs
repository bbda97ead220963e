//! `landfall backup`, `landfall restore`, `landfall db check` and `db move`: care of the embedded store, without a server.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};

use super::terminal::say;
use crate::config::{AGENT_YAML, Config};
use crate::store::{care, relocate};

/// Copy the store into a new folder, while the agent works
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  landfall backup /var/backups/landfall-$(date +%F)\n\nThe copy is read again before the command ends well. It holds the admin token and the key of sealed Secrets: keep it as\nyou keep those. git mirrors are not in it; they come again by themselves."
)]
pub struct Arguments {
    /// A folder that is missing or empty
    #[arg(value_name = "FOLDER")]
    to: PathBuf,
    #[command(flatten)]
    place: StoreArguments,
}

/// Put a backup into the place of the store; the agent must be stopped
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  landfall restore /var/backups/landfall-2026-11-26\n\nWhat was there is moved aside, not removed."
)]
pub struct RestoreArguments {
    /// A folder that `landfall backup` has made
    #[arg(value_name = "FOLDER")]
    from: PathBuf,
    #[command(flatten)]
    place: StoreArguments,
}

/// Look after the store's files
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  landfall db check")]
pub struct DbArguments {
    #[command(subcommand)]
    command: DbCommand,
}

#[derive(Debug, Subcommand)]
enum DbCommand {
    /// Read both files from end to end, and say whether they are whole; the agent may run
    Check {
        #[command(flatten)]
        place: StoreArguments,
    },
    /// Copy the SQLite store of `data_dir` to the PostgreSQL that `database` names; the agent must be stopped
    #[command(
        after_help = "Examples:\n  landfall db move\n\nFirst write `database: postgres://…` into agent.yaml, then stop the agent, move, and start it. The files stay as they are."
    )]
    Move {
        #[command(flatten)]
        place: StoreArguments,
    },
}

#[derive(Debug, Args)]
struct StoreArguments {
    /// The operator's file, which names the data folder
    #[arg(long, value_name = "FILE", default_value = AGENT_YAML)]
    config: PathBuf,
}

impl StoreArguments {
    fn data_dir(&self) -> anyhow::Result<PathBuf> {
        let config = Config::load(&self.config)?;
        let database = config.database.as_ref().map(crate::config::Secret::expose);
        anyhow::ensure!(
            database.is_none_or(|database| database == "sqlite"),
            "the store of {} is PostgreSQL: use pg_dump and pg_restore",
            self.config.display()
        );
        Ok(config.data_dir)
    }
}

pub async fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let data_dir = arguments.place.data_dir()?;
    care::backup(&data_dir, &arguments.to).await?;
    say!(
        "{} is copied to {}, and the copy is whole",
        data_dir.display(),
        arguments.to.display()
    );
    Ok(ExitCode::SUCCESS)
}

pub async fn restore(arguments: &RestoreArguments) -> anyhow::Result<ExitCode> {
    let data_dir = arguments.place.data_dir()?;
    let aside = care::restore(&arguments.from, &data_dir).await?;
    say!("{} holds the backup again", data_dir.display());
    if let Some(aside) = aside {
        say!("  what was there is in {}", aside.display());
    }
    Ok(ExitCode::SUCCESS)
}

pub async fn db(arguments: &DbArguments) -> anyhow::Result<ExitCode> {
    match &arguments.command {
        DbCommand::Check { place } => {
            let data_dir = place.data_dir()?;
            care::check(&data_dir).await?;
            say!("the store in {} is whole", data_dir.display());
        }
        DbCommand::Move { place } => {
            let config = Config::load(&place.config)?;
            let database = config.database.as_ref().map(crate::config::Secret::expose);
            let Some(url) = database.filter(|database| *database != "sqlite") else {
                anyhow::bail!(
                    "{} names no PostgreSQL: write `database: postgres://user@host/name` into it first",
                    place.config.display()
                );
            };
            let rows = relocate::relocate(&config.data_dir, url).await?;
            let from = config.data_dir.display();
            say!("{rows} rows of {from} are in PostgreSQL; the agent can start");
        }
    }
    Ok(ExitCode::SUCCESS)
}
