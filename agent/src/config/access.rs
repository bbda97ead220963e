//! Where the command line finds an agent, and what it shows it.

use std::net::SocketAddr;
use std::path::Path;

use secrecy::SecretString;

use super::{AGENT_YAML, Config, Secret, is_loopback_url};

/// How the command line reaches an agent.
#[derive(Debug, Clone)]
pub struct Access {
    /// Without a slash at its end.
    pub server: String,
    pub token: Option<Secret>,
}

impl Access {
    /// `--server`, then `LANDFALL_SERVER`, then `listen` of agent.yaml; the token of `LANDFALL_TOKEN`, of the file that
    /// `LANDFALL_TOKEN_FILE` names, or of `data_dir/admin-token`. That last one is only for an agent on this machine.
    pub fn find(server: Option<&str>, config_path: Option<&Path>) -> anyhow::Result<Self> {
        Self::find_with(server, config_path, &|name| std::env::var(name).ok())
    }

    /// As `find`, with the variables given: what tests call.
    pub fn find_with(
        server: Option<&str>,
        config_path: Option<&Path>,
        variable: &dyn Fn(&str) -> Option<String>,
    ) -> anyhow::Result<Self> {
        let config = match config_path {
            Some(path) => Some(Config::load_with(path, variable)?),
            None => Config::load_with(Path::new(AGENT_YAML), variable).ok(),
        };
        let listen = config.as_ref().map(|config| reachable(config.listen));
        let server = server
            .map(str::to_owned)
            .or_else(|| variable("LANDFALL_SERVER").filter(|server| !server.is_empty()))
            .or_else(|| listen.map(|listen| format!("http://{listen}")))
            .unwrap_or_else(|| format!("http://{}", super::listen()));
        let server = server.trim_end_matches('/').to_owned();
        let is_here = is_loopback_url(&server);
        let token = match variable("LANDFALL_TOKEN_FILE") {
            Some(path) => Some(Secret::from_file(Path::new(&path))?),
            None => variable("LANDFALL_TOKEN").map(|text| Secret::Text(SecretString::from(text))),
        };
        let file = config.map(|config| config.data_dir.join("admin-token"));
        let token = token.or_else(|| Secret::from_file(&file.filter(|_| is_here)?).ok());
        Ok(Self { server, token })
    }
}

/// What to connect to where somebody listens on all addresses.
pub fn reachable(listen: SocketAddr) -> SocketAddr {
    match listen.ip() {
        ip if !ip.is_unspecified() => listen,
        std::net::IpAddr::V4(_) => (std::net::Ipv4Addr::LOCALHOST, listen.port()).into(),
        std::net::IpAddr::V6(_) => (std::net::Ipv6Addr::LOCALHOST, listen.port()).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::ENVIRONMENT;
    use super::*;

    #[test]
    fn the_admin_token_goes_to_this_machine_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(AGENT_YAML);
        std::fs::write(
            &path,
            format!("listen: 0.0.0.0:9000\nread_access: token\n{ENVIRONMENT}"),
        )
        .unwrap();
        std::fs::create_dir(folder.path().join("data")).unwrap();
        std::fs::write(folder.path().join("data/admin-token"), "admin\n").unwrap();
        let find = |server: Option<&str>, variables: &[(&str, &str)]| {
            let variable = |name: &str| {
                let found = variables.iter().find(|(n, _)| *n == name);
                found.map(|(_, value)| (*value).to_owned())
            };
            let access = Access::find_with(server, Some(&path), &variable).unwrap();
            (
                access.server,
                access.token.map(|token| token.expose().to_owned()),
            )
        };
        let own = ("http://127.0.0.1:9000".to_owned(), Some("admin".to_owned()));
        assert_eq!(find(None, &[]), own.clone());
        assert_eq!(find(None, &[("LANDFALL_SERVER", "")]), own);
        let away = [("LANDFALL_SERVER", "https://ci.example.org/")];
        assert_eq!(
            find(None, &away),
            ("https://ci.example.org".to_owned(), None)
        );
        assert_eq!(
            find(Some("http://localhost:1"), &away).1.as_deref(),
            Some("admin")
        );
        let given = [away[0], ("LANDFALL_TOKEN", "mine")];
        assert_eq!(find(None, &given).1.as_deref(), Some("mine"));
    }
}
