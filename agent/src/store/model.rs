//! The queue, its leases and its fences as a pure state machine, tried twice: `queue_model` is what the store must do, and
//! seeded sequences compare the two; `agents` lets two agents, three pushes and two losses (a crash, or a freeze that lasts
//! longer than the lease) follow each other in every possible way, and looks for one that breaks a promise.

use crate::builds::{BuildKind, Status};

/// One row of `builds`: what the rules look at.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Row {
    kind: BuildKind,
    status: Status,
    fence: i64,
    deploying: bool,
    cancel_requested: bool,
    superseded_by: Option<usize>,
}

/// The builds of one environment and branch, in the order of their numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
struct Queue {
    rows: Vec<Row>,
    fence: i64,
}

impl Queue {
    /// The new build's place. A push takes the place of all that waits or has not begun to deploy; a build by hand that of
    /// others by hand.
    fn add(&mut self, kind: BuildKind) -> usize {
        let id = self.rows.len();
        for row in &mut self.rows {
            let gives_way = kind == BuildKind::Push || row.kind != BuildKind::Push;
            match row.status {
                Status::Queued if gives_way => {
                    row.status = Status::Superseded;
                    row.superseded_by = Some(id);
                }
                Status::Running if gives_way && !row.deploying => {
                    row.superseded_by.get_or_insert(id);
                }
                _ => {}
            }
        }
        self.rows.push(Row {
            kind,
            status: Status::Queued,
            fence: 0,
            deploying: false,
            cancel_requested: false,
            superseded_by: None,
        });
        id
    }

    fn running(&self) -> Option<usize> {
        let mut rows = self.rows.iter();
        rows.position(|row| row.status == Status::Running)
    }

    /// The oldest that waits, one by hand before a push, while nothing runs.
    fn claim(&mut self) -> Option<usize> {
        let waiting = |kind: BuildKind| {
            let mut rows = self.rows.iter();
            rows.position(|row| row.status == Status::Queued && row.kind == kind)
        };
        let id = waiting(BuildKind::Manual).or_else(|| waiting(BuildKind::Push));
        let id = id.filter(|_| self.running().is_none())?;
        self.take(id);
        Some(id)
    }

    /// Takes a build over from who held it with `fence`.
    fn reclaim(&mut self, id: usize, fence: i64) -> bool {
        let is_held = self.is_held(id, fence);
        match is_held {
            true => self.take(id),
            false => self.fence += 1,
        }
        is_held
    }

    fn take(&mut self, id: usize) {
        self.fence += 1;
        self.rows[id].status = Status::Running;
        self.rows[id].fence = self.fence;
    }

    fn is_held(&self, id: usize, fence: i64) -> bool {
        self.rows[id].status == Status::Running && self.rows[id].fence == fence
    }

    /// The last moment for a newer push or a person.
    fn begin_deploying(&mut self, id: usize, fence: i64) -> bool {
        let row = &mut self.rows[id];
        let may = row.fence == fence && row.superseded_by.is_none() && !row.cancel_requested;
        row.deploying |= may;
        may
    }

    fn finish(&mut self, id: usize, fence: i64, status: Status) -> bool {
        let is_held = self.is_held(id, fence);
        if is_held {
            self.rows[id].status = status;
        }
        is_held
    }

    fn cancel(&mut self, id: usize) {
        let row = &mut self.rows[id];
        row.cancel_requested |= matches!(row.status, Status::Queued | Status::Running);
        if row.status == Status::Queued {
            row.status = Status::Canceled;
        }
    }
}

#[cfg(test)]
mod agents {
    use stateright::{Checker, Model, Property};

    use super::*;

    const PUSHES: usize = 3;
    const LOSSES: usize = 2;

    /// Where an agent is with a build: between each two of these it may be killed or frozen, and the other go on.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    enum Step {
        Claimed,
        /// `begin_deploying` has let it through.
        Planned,
        /// The store has said that it holds the build.
        Asked,
        /// The labels are read: the Lease's number must be at least this.
        Read(i64),
        /// The Lease is claimed with this number.
        Leased(i64),
        /// The store has said so once more.
        Sure(i64),
        /// The number stands on the object as its label.
        Fenced(i64),
        /// There was no object, and the Lease was still ours.
        Absent(i64),
        Applied,
    }

    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    enum Agent {
        Dead,
        Idle,
        Works {
            build: usize,
            fence: i64,
            step: Step,
            is_frozen: bool,
        },
    }

    /// The environment's object in the cluster.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    struct Object {
        label: i64,
        build: usize,
    }

    #[derive(Debug, Clone, PartialEq, Eq, Hash)]
    struct World {
        queue: Queue,
        agents: [Agent; 2],
        lease: i64,
        object: Option<Object>,
        losses: usize,
        /// The greatest fence of the store under which something was applied.
        newest_writer: i64,
        seen: Seen,
    }

    /// What happened on the way here.
    #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
    struct Seen {
        went_back: bool,
        stale_write: bool,
        rose_again: bool,
        refused_by_store: bool,
        refused_by_cluster: bool,
        taken_over_while_deploying: bool,
    }

    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    enum Action {
        Push,
        Claim(usize),
        TakeOver(usize),
        Step(usize),
        Crash(usize),
        Freeze(usize),
        Wake(usize),
        Restart(usize),
    }

    impl World {
        /// Nobody that is awake works on the build that runs.
        fn abandoned(&self) -> Option<usize> {
            let running = self.queue.running()?;
            let is_at_work = |agent: &Agent| {
                matches!(agent, Agent::Works { build, fence, is_frozen: false, .. }
                    if *build == running && self.queue.is_held(*build, *fence))
            };
            (!self.agents.iter().any(is_at_work)).then_some(running)
        }

        fn step(&mut self, agent: usize, build: usize, fence: i64, step: Step) {
            let next = match step {
                Step::Claimed if self.queue.begin_deploying(build, fence) => Some(Step::Planned),
                Step::Claimed => {
                    self.end(build, fence, Status::Superseded);
                    None
                }
                Step::Planned => self.ask(build, fence).then_some(Step::Asked),
                Step::Asked => {
                    let label = self.object.map_or(0, |object| object.label);
                    Some(Step::Read(fence.max(label + 1)))
                }
                Step::Read(at_least) => {
                    self.lease = at_least.max(self.lease + 1);
                    Some(Step::Leased(self.lease))
                }
                Step::Leased(number) => self.ask(build, fence).then_some(Step::Sure(number)),
                Step::Sure(number) => match &mut self.object {
                    Some(object) if object.label > number => self.refused(build, fence),
                    Some(object) => {
                        object.label = number;
                        Some(Step::Fenced(number))
                    }
                    None if self.lease == number => Some(Step::Absent(number)),
                    // Whoever still has the store's word claims the Lease anew, the other one leaves.
                    None => self.ask(build, fence).then_some(Step::Planned),
                },
                Step::Fenced(number)
                    if self.object.is_some_and(|object| object.label == number) =>
                {
                    self.write(build, fence, number)
                }
                Step::Fenced(_) => self.refused(build, fence),
                // With resourceVersion "1": refused where somebody was quicker, and read again.
                Step::Absent(number) if self.object.is_some() => Some(Step::Sure(number)),
                Step::Absent(number) => self.write(build, fence, number),
                Step::Applied => {
                    self.end(build, fence, Status::Passed);
                    None
                }
            };
            self.agents[agent] = next.map_or(Agent::Idle, |step| Agent::Works {
                build,
                fence,
                step,
                is_frozen: false,
            });
        }

        fn ask(&mut self, build: usize, fence: i64) -> bool {
            let is_held = self.queue.is_held(build, fence);
            self.seen.refused_by_store |= !is_held;
            is_held
        }

        fn write(&mut self, build: usize, fence: i64, label: i64) -> Option<Step> {
            self.seen.went_back |= self.object.is_some_and(|object| object.build > build);
            self.seen.stale_write |= fence < self.newest_writer;
            self.newest_writer = self.newest_writer.max(fence);
            self.object = Some(Object { label, build });
            Some(Step::Applied)
        }

        /// Somebody has written a greater number on the object: nothing more is ours to write.
        fn refused(&mut self, build: usize, fence: i64) -> Option<Step> {
            self.seen.refused_by_cluster = true;
            self.end(build, fence, Status::Errored);
            None
        }

        fn end(&mut self, build: usize, fence: i64, status: Status) {
            let was = self.queue.rows[build].status;
            let has_ended = self.queue.finish(build, fence, status);
            self.seen.rose_again |= has_ended && was != Status::Running;
        }
    }

    struct Agents;

    impl Model for Agents {
        type State = World;
        type Action = Action;

        fn init_states(&self) -> Vec<World> {
            vec![World {
                queue: Queue::default(),
                agents: [Agent::Idle; 2],
                lease: 0,
                object: None,
                losses: 0,
                newest_writer: 0,
                seen: Seen::default(),
            }]
        }

        fn actions(&self, world: &World, actions: &mut Vec<Action>) {
            if world.queue.rows.len() < PUSHES {
                actions.push(Action::Push);
            }
            for (index, agent) in world.agents.iter().enumerate() {
                let may_be_lost = world.losses < LOSSES;
                match agent {
                    Agent::Dead => actions.push(Action::Restart(index)),
                    Agent::Works {
                        is_frozen: true, ..
                    } => actions.push(Action::Wake(index)),
                    Agent::Works { .. } => {
                        actions.push(Action::Step(index));
                        if may_be_lost {
                            actions.extend([Action::Crash(index), Action::Freeze(index)]);
                        }
                    }
                    Agent::Idle if world.queue.clone().claim().is_some() => {
                        actions.push(Action::Claim(index));
                    }
                    Agent::Idle if world.abandoned().is_some() => {
                        actions.push(Action::TakeOver(index));
                    }
                    Agent::Idle => {}
                }
            }
        }

        fn next_state(&self, world: &World, action: Action) -> Option<World> {
            let mut world = world.clone();
            match action {
                Action::Push => {
                    world.queue.add(BuildKind::Push);
                }
                Action::Claim(agent) => {
                    let build = world.queue.claim()?;
                    world.agents[agent] = works(build, world.queue.fence, Step::Claimed);
                }
                Action::TakeOver(agent) => {
                    let build = world.abandoned()?;
                    let row = world.queue.rows[build].clone();
                    world.queue.reclaim(build, row.fence);
                    let step = match row.deploying {
                        true => Step::Planned,
                        false => Step::Claimed,
                    };
                    world.seen.taken_over_while_deploying |= row.deploying;
                    world.agents[agent] = works(build, world.queue.fence, step);
                }
                Action::Step(agent) => {
                    let Agent::Works {
                        build, fence, step, ..
                    } = world.agents[agent]
                    else {
                        return None;
                    };
                    world.step(agent, build, fence, step);
                }
                Action::Crash(agent) => {
                    world.losses += 1;
                    world.agents[agent] = Agent::Dead;
                }
                Action::Freeze(agent) | Action::Wake(agent) => {
                    let freezes = matches!(action, Action::Freeze(_));
                    world.losses += usize::from(freezes);
                    if let Agent::Works { is_frozen, .. } = &mut world.agents[agent] {
                        *is_frozen = freezes;
                    }
                }
                Action::Restart(agent) => world.agents[agent] = Agent::Idle,
            }
            Some(world)
        }

        fn properties(&self) -> Vec<Property<Self>> {
            vec![
                Property::always("P4: never backwards", |_, world: &World| {
                    !world.seen.went_back
                }),
                Property::always("P5: one mutator", |_, world: &World| {
                    !world.seen.stale_write
                }),
                Property::always("P7: an end is an end", |_, world: &World| {
                    !world.seen.rose_again
                }),
                Property::always(
                    "who holds the environment is not refused",
                    |_, world: &World| {
                        let mut rows = world.queue.rows.iter();
                        rows.all(|row| row.status != Status::Errored)
                    },
                ),
                Property::always(
                    "P2: whatever comes, the last push is live",
                    |model: &Self, world| {
                        let mut actions = Vec::new();
                        model.actions(world, &mut actions);
                        let mut rows = world.queue.rows.iter();
                        let live = world.object.map(|object| object.build);
                        !actions.is_empty()
                            || rows
                                .all(|row| !matches!(row.status, Status::Queued | Status::Running))
                                && live == Some(PUSHES - 1)
                    },
                ),
                // That the trial sees what it is about.
                Property::sometimes("the store refuses one that wakes", |_, world: &World| {
                    world.seen.refused_by_store
                }),
                Property::sometimes("the cluster refuses one that wakes", |_, world: &World| {
                    world.seen.refused_by_cluster
                }),
                Property::sometimes("a release is taken over", |_, world: &World| {
                    world.seen.taken_over_while_deploying
                }),
            ]
        }
    }

    fn works(build: usize, fence: i64, step: Step) -> Agent {
        Agent::Works {
            build,
            fence,
            step,
            is_frozen: false,
        }
    }

    #[test]
    fn two_agents_keep_the_promises_in_every_order_of_three_pushes_and_two_losses() {
        let checked = Agents.checker().threads(2).spawn_bfs().join();
        println!("{} states", checked.unique_state_count());
        checked.assert_properties();
    }
}

#[cfg(test)]
mod sequences {
    use std::collections::HashSet;

    use super::*;
    use crate::builds::{Build, Outcome, Push};
    use crate::store::dialect::Db;
    use crate::store::{Delivery, Filter, Store};

    const STEPS: usize = 24;
    const SEQUENCES: u64 = 200;

    /// What a holder believes: its own may be old.
    type Belief = (usize, Build);

    struct Pair {
        store: Store,
        environment: String,
        queue: Queue,
        /// Numbers of the builds in the store.
        ids: Vec<i64>,
        beliefs: Vec<Belief>,
    }

    impl Pair {
        async fn step(&mut self, random: &mut fastrand::Rng) -> String {
            let believed = (!self.beliefs.is_empty()).then(|| random.usize(..self.beliefs.len()));
            match (random.u8(..10), believed) {
                (0..=2, _) => self.add(BuildKind::Push).await,
                (3, _) => self.add(BuildKind::Manual).await,
                (4..=5, _) => self.claim().await,
                (6, Some(belief)) => self.take_over(belief).await,
                (7, Some(belief)) => self.begin_deploying(belief).await,
                (8, Some(belief)) => self.finish(belief).await,
                (9, _) if !self.ids.is_empty() => self.cancel(random.usize(..self.ids.len())).await,
                _ => self.claim().await,
            }
        }

        async fn add(&mut self, kind: BuildKind) -> String {
            let place = self.queue.add(kind);
            let push = push(&self.environment, place);
            let id = match kind {
                BuildKind::Push => {
                    let delivery = Delivery {
                        guid: String::new(),
                        event: "push".to_owned(),
                        body_hash: push.after.clone(),
                        body: Vec::new(),
                    };
                    let environments = [self.environment.as_str()];
                    let accepted = self.store.accept(delivery, push, &environments, None).await;
                    accepted.unwrap().remove(0).build
                }
                _ => self
                    .store
                    .enqueue(&self.environment, &push, kind)
                    .await
                    .unwrap(),
            };
            self.ids.push(id);
            // A burst has settled.
            let Db::Sqlite(pool) = &self.store.main else {
                panic!("not SQLite")
            };
            sqlx::query("UPDATE builds SET queued_at = 0 WHERE id = $1")
                .bind(id)
                .execute(pool)
                .await
                .unwrap();
            format!("{kind:?} → {place}")
        }

        async fn claim(&mut self) -> String {
            let modelled = self.queue.claim();
            let claimed = self.store.claim("agent", false).await.unwrap();
            let place = claimed.as_ref().map(|build| self.place(build));
            assert_eq!(place, modelled, "claimed");
            self.believe(claimed);
            format!("claim → {modelled:?}")
        }

        async fn take_over(&mut self, belief: usize) -> String {
            let (place, build) = self.beliefs[belief].clone();
            let modelled = self.queue.reclaim(place, build.fence);
            let taken = self.store.reclaim(&build, "other").await.unwrap();
            assert_eq!(taken.is_some(), modelled, "taken over");
            self.believe(taken);
            format!("take over {place} from {} → {modelled}", build.fence)
        }

        async fn begin_deploying(&mut self, belief: usize) -> String {
            let (place, build) = &self.beliefs[belief];
            let modelled = self.queue.begin_deploying(*place, build.fence);
            let begun = self.store.begin_deploying(build).await.unwrap();
            assert_eq!(begun, modelled, "begun to deploy");
            format!("deploy {place} under {} → {modelled}", build.fence)
        }

        async fn finish(&mut self, belief: usize) -> String {
            let (place, build) = &self.beliefs[belief];
            let modelled = self.queue.finish(*place, build.fence, Status::Passed);
            let (status, outcome) = (Status::Passed, Outcome::Live);
            let finished = self
                .store
                .finish(build, status, outcome, None)
                .await
                .unwrap();
            assert_eq!(finished, modelled, "finished");
            format!("finish {place} under {} → {modelled}", build.fence)
        }

        async fn cancel(&mut self, place: usize) -> String {
            self.queue.cancel(place);
            self.store
                .cancel(self.ids[place], "somebody")
                .await
                .unwrap();
            format!("cancel {place}")
        }

        fn place(&self, build: &Build) -> usize {
            self.ids.iter().position(|id| *id == build.id).unwrap()
        }

        fn believe(&mut self, build: Option<Build>) {
            let place = build.as_ref().map(|build| self.place(build));
            self.beliefs.extend(place.zip(build));
        }

        /// Every build as the model has it.
        async fn compare(&self) {
            let filter = Filter {
                environment: Some(self.environment.clone()),
                limit: Some(200),
                ..Filter::default()
            };
            let mut builds = self.store.builds(&filter).await.unwrap();
            builds.reverse();
            assert_eq!(builds.len(), self.ids.len());
            for ((row, id), build) in self.queue.rows.iter().zip(&self.ids).zip(builds) {
                assert_eq!(build.id, *id);
                let superseded_by = row.superseded_by.map(|place| self.ids[place]);
                assert_eq!(
                    (
                        build.status,
                        build.fence,
                        build.cancel_requested,
                        build.superseded_by
                    ),
                    (row.status, row.fence, row.cancel_requested, superseded_by),
                    "build {id}"
                );
            }
        }
    }

    fn push(environment: &str, place: usize) -> Push {
        Push {
            repository_id: Some(1),
            repository: "acme/hello".to_owned(),
            branch: "main".to_owned(),
            before: format!("{environment}-{}", place.wrapping_sub(1)),
            after: format!("{environment}-{place}"),
            pusher: "mona".to_owned(),
            title: String::new(),
            pushed_at: None,
        }
    }

    /// `SEQUENCES` and `SEED` in the environment: how many, and from which on.
    #[tokio::test]
    async fn the_store_does_what_the_model_does() {
        let number =
            |name: &str, or: u64| std::env::var(name).map_or(or, |value| value.parse().unwrap());
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), None).await.unwrap();
        let first = number("SEED", fastrand::u64(..u64::from(u32::MAX)));
        let sequences = number("SEQUENCES", SEQUENCES);
        let mut seen = HashSet::new();
        for seed in first..first + sequences {
            println!("SEED={seed}");
            let environment = format!("environment-{seed}");
            let Db::Sqlite(pool) = &store.main else {
                panic!("not SQLite")
            };
            sqlx::query("INSERT INTO environments (name) VALUES ($1)")
                .bind(&environment)
                .execute(pool)
                .await
                .unwrap();
            let mut random = fastrand::Rng::with_seed(seed);
            let mut pair = Pair {
                store: store.clone(),
                environment,
                queue: Queue::default(),
                ids: Vec::new(),
                beliefs: Vec::new(),
            };
            for _ in 0..STEPS {
                let step = pair.step(&mut random).await;
                println!("  {step}");
                seen.insert(
                    step.split(' ').next().unwrap_or_default().to_owned()
                        + step.rsplit(' ').next().unwrap_or_default(),
                );
                pair.compare().await;
            }
            sqlx::query(
                "UPDATE builds SET status = 'canceled' WHERE status IN ('queued', 'running')",
            )
            .execute(pool)
            .await
            .unwrap();
        }
        // Few sequences need not show both ends of each.
        if sequences < SEQUENCES {
            return;
        }
        for both in ["take", "deploy", "finish"]
            .iter()
            .flat_map(|step| ["true", "false"].map(|end| format!("{step}{end}")))
        {
            assert!(seen.contains(&both), "no sequence has seen {both}");
        }
    }
}
