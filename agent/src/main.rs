fn main() -> std::process::ExitCode {
    if std::env::args().nth(1).as_deref() == Some(landfall::git_process::SUBCOMMAND) {
        return landfall::git_child::main_in_child();
    }
    std::process::ExitCode::FAILURE
}
