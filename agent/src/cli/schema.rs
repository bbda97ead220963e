//! `landfall schema`: the JSON schema of pipeline.yaml, as editors read it.

use std::process::ExitCode;

use schemars::generate::SchemaSettings;

use super::terminal;
use crate::pipeline::Pipeline;

pub fn run() -> anyhow::Result<ExitCode> {
    let schema = SchemaSettings::draft07()
        .into_generator()
        .into_root_schema_for::<Pipeline>();
    terminal::print_json(schema.as_value())?;
    Ok(ExitCode::SUCCESS)
}
