//! Checkout over ssh, against a real sshd on a loopback port.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::checkout::{Agent, environment};
use crate::git_world::World;
use crate::support::eventually;

/// sshd as whoever runs the test, killed when dropped.
struct Sshd {
    child: Child,
    port: u16,
    user: String,
}

impl Drop for Sshd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn key(folder: &Path, name: &str) -> PathBuf {
    let path = folder.join(name);
    let made = Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-C", name, "-f"])
        .arg(&path)
        .status();
    assert!(
        made.unwrap().success(),
        "ssh-keygen (package openssh-client) is needed"
    );
    path
}

fn public(key: &Path) -> String {
    std::fs::read_to_string(key.with_extension("pub")).unwrap()
}

async fn sshd(folder: &Path, host_key: &Path, authorized: &Path) -> Sshd {
    let program = Path::new("/usr/sbin/sshd");
    assert!(program.exists(), "sshd (package openssh-server) is needed");
    // Where sshd gives up its rights; the package's service makes it, and no service runs here.
    let _ = std::fs::create_dir_all("/run/sshd");
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let settings = folder.join("sshd_config");
    let text = format!(
        "ListenAddress 127.0.0.1\nPort {port}\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n",
        host_key.display(),
        authorized.display()
    );
    std::fs::write(&settings, text).unwrap();
    let child = Command::new(program)
        .args(["-D", "-e", "-f"])
        .arg(&settings)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let user = Command::new("id").arg("-un").output().unwrap().stdout;
    let user = String::from_utf8(user).unwrap().trim().to_owned();
    let sshd = Sshd { child, port, user };
    eventually("sshd listens", Duration::from_secs(10), async || {
        std::net::TcpStream::connect(("127.0.0.1", port)).ok()
    })
    .await;
    sshd
}

#[tokio::test]
async fn over_ssh_only_the_right_key_and_only_the_pinned_host_count() {
    let world = World::new();
    let commit = world.commit("First");
    world.push("main");
    let folder = tempfile::tempdir().unwrap();
    let [host, other_host, mine, strange] =
        ["host", "other_host", "mine", "strange"].map(|name| key(folder.path(), name));
    let authorized = folder.path().join("authorized_keys");
    std::fs::write(&authorized, public(&mine)).unwrap();
    let sshd = sshd(folder.path(), &host, &authorized).await;
    let url = format!(
        "ssh://{}@127.0.0.1:{}{}",
        sshd.user,
        sshd.port,
        world.bare().display()
    );
    let pinned = |name: &str, key: &Path| {
        let path = folder.path().join(name);
        let line = format!("[127.0.0.1]:{} {}", sshd.port, public(key));
        std::fs::write(&path, line).unwrap();
        path
    };
    let (right, wrong) = (pinned("right", &host), pinned("wrong", &other_host));
    let empty = folder.path().join("empty");
    std::fs::write(&empty, "").unwrap();
    let with = |key: &Path, known_hosts: &Path| {
        environment(
            &url,
            &format!(
                "    ssh_key: {}\n    known_hosts: {}\n    limits: {{ unreachable_seconds: 5 }}\n",
                key.display(),
                known_hosts.display()
            ),
        )
    };

    let agent = Agent::new();
    for known_hosts in [&wrong, &empty] {
        let error = agent
            .checkout(&with(&mine, known_hosts), &commit)
            .await
            .agent_error();
        assert!(error.contains("host key ssh-ed25519 SHA256:"), "{error}");
        assert!(error.contains("`known_hosts`"), "{error}");
    }
    let error = agent
        .checkout(&with(&strange, &right), &commit)
        .await
        .agent_error();
    assert!(
        error.contains("does not accept the key `ssh_key`"),
        "{error}"
    );
    let missing = folder.path().join("missing");
    let error = agent
        .checkout(&with(&missing, &right), &commit)
        .await
        .agent_error();
    assert!(error.contains("cannot read `ssh_key`"), "{error}");
    let checked_out = agent.checkout(&with(&mine, &right), &commit).await.ready();
    assert!(checked_out.tree.join("pipeline.yaml").exists());
}
