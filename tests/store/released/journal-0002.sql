BEGIN TRANSACTION;
CREATE TABLE alpha_spend (
	alpha_spend_id INTEGER NOT NULL, 
	snapshot_id VARCHAR(32) NOT NULL, 
	context_key VARCHAR NOT NULL, 
	experiment_id VARCHAR(40) NOT NULL, 
	test_index INTEGER NOT NULL, 
	level DOUBLE NOT NULL, 
	created_at DOUBLE NOT NULL, 
	is_rejection BOOLEAN, 
	CONSTRAINT pk_alpha_spend PRIMARY KEY (alpha_spend_id), 
	CONSTRAINT fk_alpha_spend_experiment_id_experiment FOREIGN KEY(experiment_id) REFERENCES experiment (experiment_id), 
	CONSTRAINT fk_alpha_spend_snapshot_id_snapshot FOREIGN KEY(snapshot_id) REFERENCES snapshot (snapshot_id), 
	CONSTRAINT uq_alpha_spend_experiment_id UNIQUE (experiment_id)
);
INSERT INTO "alpha_spend" VALUES(1,'snap-1','any','t1',1,0.0025,1790000200.0,1);
CREATE TABLE anomaly (
	anomaly_id INTEGER NOT NULL, 
	rule VARCHAR NOT NULL, 
	kind VARCHAR NOT NULL, 
	metric VARCHAR NOT NULL, 
	started_at DOUBLE NOT NULL, 
	observed DOUBLE NOT NULL, 
	"limit" DOUBLE NOT NULL, 
	reason VARCHAR NOT NULL, 
	ended_at DOUBLE, layer VARCHAR(1) DEFAULT 'A' NOT NULL, severity VARCHAR DEFAULT 'ticket' NOT NULL, label VARCHAR DEFAULT '' NOT NULL, worst DOUBLE, change_id INTEGER, details JSON DEFAULT '{}' NOT NULL, 
	CONSTRAINT pk_anomaly PRIMARY KEY (anomaly_id)
);
INSERT INTO "anomaly" VALUES(1,'slo_burn','condition','e2e_s',1790000085.0,2.5,2.0,'p95 is 2.5 s, limit 2 s.',1790000420.0,'A','page','p95',3.1,NULL,'{"burn": 14.4}');
INSERT INTO "anomaly" VALUES(2,'forecast','condition','requests_per_s',1790000500.0,9.0,4.0,'Outside the forecast.',NULL,'C','ticket','',NULL,NULL,'{}');
CREATE TABLE champion (
	champion_id INTEGER NOT NULL, 
	snapshot_id VARCHAR(32) NOT NULL, 
	config_id VARCHAR(16) NOT NULL, 
	since_at DOUBLE NOT NULL, 
	change_id INTEGER, 
	CONSTRAINT pk_champion PRIMARY KEY (champion_id), 
	CONSTRAINT fk_champion_config_id_config FOREIGN KEY(config_id) REFERENCES config (config_id), 
	CONSTRAINT fk_champion_snapshot_id_snapshot FOREIGN KEY(snapshot_id) REFERENCES snapshot (snapshot_id)
);
INSERT INTO "champion" VALUES(1,'snap-1','aaaaaaaaaaaa',1790000000.0,1);
INSERT INTO "champion" VALUES(2,'snap-1','bbbbbbbbbbbb',1790000401.0,2);
CREATE TABLE change (
	change_id INTEGER NOT NULL, 
	snapshot_id VARCHAR(32) NOT NULL, 
	kind VARCHAR NOT NULL, 
	from_config_id VARCHAR(16), 
	to_config_id VARCHAR(16) NOT NULL, 
	created_at DOUBLE NOT NULL, 
	reason VARCHAR NOT NULL, 
	state VARCHAR NOT NULL, 
	verdict_id INTEGER, 
	applied_at DOUBLE, 
	version INTEGER, 
	prepare_s DOUBLE, 
	commit_us DOUBLE, 
	CONSTRAINT pk_change PRIMARY KEY (change_id), 
	CONSTRAINT fk_change_from_config_id_config FOREIGN KEY(from_config_id) REFERENCES config (config_id), 
	CONSTRAINT fk_change_snapshot_id_snapshot FOREIGN KEY(snapshot_id) REFERENCES snapshot (snapshot_id), 
	CONSTRAINT fk_change_to_config_id_config FOREIGN KEY(to_config_id) REFERENCES config (config_id)
);
INSERT INTO "change" VALUES(1,'snap-1','start',NULL,'aaaaaaaaaaaa',1790000000.0,'First start.','APPLIED',NULL,1790000000.0,1,NULL,NULL);
INSERT INTO "change" VALUES(2,'snap-1','promote','aaaaaaaaaaaa','bbbbbbbbbbbb',1790000400.0,'Approved by ada.','APPLIED',1,1790000401.0,2,0.001,12.0);
CREATE TABLE config (
	config_id VARCHAR(16) NOT NULL, 
	created_at DOUBLE NOT NULL, 
	knob_schema_version INTEGER NOT NULL, 
	"values" JSON NOT NULL, 
	CONSTRAINT pk_config PRIMARY KEY (config_id)
);
INSERT INTO "config" VALUES('aaaaaaaaaaaa',1790000000.0,1,'{"max_num_seqs": 16, "prefill_chunk": 256, "policy": "fcfs", "batch_wait_ms": 0.0}');
INSERT INTO "config" VALUES('bbbbbbbbbbbb',1790000100.0,1,'{"max_num_seqs": 16, "prefill_chunk": 64, "policy": "shortest_prefill", "batch_wait_ms": 0.0}');
CREATE TABLE experiment (
	experiment_id VARCHAR(40) NOT NULL, 
	kind VARCHAR NOT NULL, 
	snapshot_id VARCHAR(32) NOT NULL, 
	study_id INTEGER, 
	champion_config_id VARCHAR(16) NOT NULL, 
	challenger_config_id VARCHAR(16) NOT NULL, 
	created_at DOUBLE NOT NULL, 
	state VARCHAR NOT NULL, 
	rules JSON NOT NULL, 
	seed INTEGER NOT NULL, 
	twin_fit_id INTEGER, 
	ended_at DOUBLE, 
	reason VARCHAR, planning JSON DEFAULT '{}' NOT NULL, 
	CONSTRAINT pk_experiment PRIMARY KEY (experiment_id), 
	CONSTRAINT fk_experiment_challenger_config_id_config FOREIGN KEY(challenger_config_id) REFERENCES config (config_id), 
	CONSTRAINT fk_experiment_champion_config_id_config FOREIGN KEY(champion_config_id) REFERENCES config (config_id), 
	CONSTRAINT fk_experiment_snapshot_id_snapshot FOREIGN KEY(snapshot_id) REFERENCES snapshot (snapshot_id), 
	CONSTRAINT fk_experiment_study_id_study FOREIGN KEY(study_id) REFERENCES study (study_id), 
	CONSTRAINT fk_experiment_twin_fit_id_twin_fit FOREIGN KEY(twin_fit_id) REFERENCES twin_fit (twin_fit_id)
);
INSERT INTO "experiment" VALUES('p1','probe','snap-1',1,'aaaaaaaaaaaa','bbbbbbbbbbbb',1790000120.0,'DECIDED','{"metric": "e2e_s", "slice_s": 12.0, "burn_in_s": 3.0, "max_pairs": 5, "level": 0.05}',11,NULL,1790000270.0,NULL,'{}');
INSERT INTO "experiment" VALUES('t1','test','snap-1',1,'aaaaaaaaaaaa','bbbbbbbbbbbb',1790000200.0,'DECIDED','{"metric": "e2e_s", "slice_s": 12.0, "burn_in_s": 3.0, "max_pairs": 5, "level": 0.05}',11,1,1790000350.0,NULL,'{"mde_ratio": 0.12, "pairs_needed": 5, "minutes_needed": 2.0}');
INSERT INTO "experiment" VALUES('h1','holdback','snap-1',NULL,'bbbbbbbbbbbb','aaaaaaaaaaaa',1790000900.0,'DECIDED','{"metric": "e2e_s", "slice_s": 12.0, "burn_in_s": 3.0, "max_pairs": 5, "level": 0.05}',11,NULL,1790001050.0,NULL,'{}');
INSERT INTO "experiment" VALUES('a1','aa','snap-1',NULL,'bbbbbbbbbbbb','bbbbbbbbbbbb',1790001000.0,'DECIDED','{"metric": "e2e_s", "slice_s": 12.0}',13,NULL,NULL,NULL,'{}');
CREATE TABLE note (
	note_id INTEGER NOT NULL, 
	at DOUBLE NOT NULL, 
	stage VARCHAR NOT NULL, 
	text VARCHAR NOT NULL, 
	details JSON NOT NULL, 
	CONSTRAINT pk_note PRIMARY KEY (note_id)
);
INSERT INTO "note" VALUES(1,1790000000.0,'promote','start: champion is now aaaaaaaaaaaa. First start.','{}');
INSERT INTO "note" VALUES(2,1790000401.0,'promote','promote: champion is now bbbbbbbbbbbb. Approved by ada.','{"change_id": 2}');
CREATE TABLE operator_action (
	operator_action_id INTEGER NOT NULL, 
	action VARCHAR NOT NULL, 
	arguments JSON NOT NULL, 
	actor VARCHAR NOT NULL, 
	requested_at DOUBLE NOT NULL, 
	state VARCHAR NOT NULL, 
	answer VARCHAR NOT NULL, role VARCHAR DEFAULT 'operator' NOT NULL, 
	CONSTRAINT pk_operator_action PRIMARY KEY (operator_action_id)
);
INSERT INTO "operator_action" VALUES(1,'approve','{"recommendation_id": 1}','ada',1790000400.0,'DONE','Applied.','operator');
INSERT INTO "operator_action" VALUES(2,'rollback','{"to": "previous"}','bob',1790000600.0,'REFUSED','Only look.','viewer');
CREATE TABLE proposal (
	proposal_id INTEGER NOT NULL, 
	study_id INTEGER NOT NULL, 
	config_id VARCHAR(16) NOT NULL, 
	created_at DOUBLE NOT NULL, 
	origin VARCHAR NOT NULL, 
	cause VARCHAR NOT NULL, 
	predicted_log_ratio DOUBLE, 
	CONSTRAINT pk_proposal PRIMARY KEY (proposal_id), 
	CONSTRAINT fk_proposal_config_id_config FOREIGN KEY(config_id) REFERENCES config (config_id), 
	CONSTRAINT fk_proposal_study_id_study FOREIGN KEY(study_id) REFERENCES study (study_id)
);
INSERT INTO "proposal" VALUES(1,1,'bbbbbbbbbbbb',1790000100.0,'search','p95 of e2e_s breached its SLO',-0.2);
CREATE TABLE quality_check (
	quality_check_id INTEGER NOT NULL, 
	snapshot_id VARCHAR(32) NOT NULL, 
	kind VARCHAR NOT NULL, 
	config_id VARCHAR(16) NOT NULL, 
	reference_config_id VARCHAR(16) NOT NULL, 
	checked_at DOUBLE NOT NULL, 
	num_positions INTEGER NOT NULL, 
	delta_nll DOUBLE NOT NULL, 
	delta_nll_high DOUBLE NOT NULL, 
	top1_agreement DOUBLE NOT NULL, 
	top1_low DOUBLE NOT NULL, 
	is_passed BOOLEAN NOT NULL, 
	reason VARCHAR NOT NULL, 
	details JSON NOT NULL, 
	CONSTRAINT pk_quality_check PRIMARY KEY (quality_check_id), 
	CONSTRAINT fk_quality_check_config_id_config FOREIGN KEY(config_id) REFERENCES config (config_id), 
	CONSTRAINT fk_quality_check_reference_config_id_config FOREIGN KEY(reference_config_id) REFERENCES config (config_id), 
	CONSTRAINT fk_quality_check_snapshot_id_snapshot FOREIGN KEY(snapshot_id) REFERENCES snapshot (snapshot_id)
);
INSERT INTO "quality_check" VALUES(1,'snap-1','challenger','bbbbbbbbbbbb','aaaaaaaaaaaa',1790000190.0,400,0.001,0.004,0.995,0.985,1,'Within 1 % of the champion.','{"num_sequences": 10}');
CREATE TABLE recommendation (
	recommendation_id INTEGER NOT NULL, 
	verdict_id INTEGER NOT NULL, 
	config_id VARCHAR(16) NOT NULL, 
	created_at DOUBLE NOT NULL, 
	state VARCHAR NOT NULL, 
	decided_at DOUBLE, 
	decided_by VARCHAR, 
	CONSTRAINT pk_recommendation PRIMARY KEY (recommendation_id), 
	CONSTRAINT fk_recommendation_config_id_config FOREIGN KEY(config_id) REFERENCES config (config_id), 
	CONSTRAINT fk_recommendation_verdict_id_verdict FOREIGN KEY(verdict_id) REFERENCES verdict (verdict_id)
);
INSERT INTO "recommendation" VALUES(1,1,'bbbbbbbbbbbb',1790000331.0,'APPROVED',1790000400.0,'ada');
CREATE TABLE run (
	run_id VARCHAR(32) NOT NULL, 
	started_at DOUBLE NOT NULL, 
	pid INTEGER NOT NULL, 
	tuner_version VARCHAR NOT NULL, 
	settings JSON NOT NULL, 
	mode VARCHAR NOT NULL, 
	ended_at DOUBLE, 
	end_reason VARCHAR, 
	CONSTRAINT pk_run PRIMARY KEY (run_id)
);
INSERT INTO "run" VALUES('run-1',1789999995.0,4242,'0.1.0','{"mode": "approve"}','approve',NULL,NULL);
CREATE TABLE slice (
	slice_id VARCHAR(48) NOT NULL, 
	experiment_id VARCHAR(40) NOT NULL, 
	pair_index INTEGER NOT NULL, 
	position INTEGER NOT NULL, 
	arm VARCHAR NOT NULL, 
	config_id VARCHAR(16) NOT NULL, 
	coin INTEGER NOT NULL, 
	coin_hash VARCHAR NOT NULL, 
	planned_start_at DOUBLE NOT NULL, 
	planned_end_at DOUBLE NOT NULL, 
	burn_in_s DOUBLE NOT NULL, 
	state VARCHAR NOT NULL, 
	boot_id VARCHAR, 
	num_requests INTEGER, 
	num_errors INTEGER, 
	response DOUBLE, 
	measured DOUBLE, 
	predicted DOUBLE, 
	stats JSON NOT NULL, 
	void_reason VARCHAR, 
	CONSTRAINT pk_slice PRIMARY KEY (slice_id), 
	CONSTRAINT fk_slice_config_id_config FOREIGN KEY(config_id) REFERENCES config (config_id), 
	CONSTRAINT fk_slice_experiment_id_experiment FOREIGN KEY(experiment_id) REFERENCES experiment (experiment_id)
);
INSERT INTO "slice" VALUES('p1-0-champion','p1',0,0,'champion','aaaaaaaaaaaa',0,'hash',1790000120.0,1790000132.0,3.0,'SCORED',NULL,8,0,0.3,0.4,0.1,'{}',NULL);
INSERT INTO "slice" VALUES('p1-0-challenger','p1',0,1,'challenger','bbbbbbbbbbbb',0,'hash',1790000132.0,1790000144.0,3.0,'SCORED',NULL,8,0,0.05,0.4,0.1,'{}',NULL);
INSERT INTO "slice" VALUES('t1-0-champion','t1',0,0,'champion','aaaaaaaaaaaa',0,'hash',1790000200.0,1790000212.0,3.0,'SCORED',NULL,8,0,0.3,0.4,0.1,'{}',NULL);
INSERT INTO "slice" VALUES('t1-0-challenger','t1',0,1,'challenger','bbbbbbbbbbbb',0,'hash',1790000212.0,1790000224.0,3.0,'SCORED',NULL,8,0,0.05,0.4,0.1,'{}',NULL);
INSERT INTO "slice" VALUES('t1-1-challenger','t1',1,0,'challenger','bbbbbbbbbbbb',1,'hash',1790000224.0,1790000236.0,3.0,'SCORED',NULL,8,0,0.05,0.4,0.1,'{}',NULL);
INSERT INTO "slice" VALUES('t1-1-champion','t1',1,1,'champion','aaaaaaaaaaaa',1,'hash',1790000236.0,1790000248.0,3.0,'SCORED',NULL,8,0,0.3,0.4,0.1,'{}',NULL);
INSERT INTO "slice" VALUES('t1-2-champion','t1',2,0,'champion','aaaaaaaaaaaa',0,'hash',1790000248.0,1790000260.0,3.0,'SCORED',NULL,8,0,0.3,0.4,0.1,'{}',NULL);
INSERT INTO "slice" VALUES('t1-2-challenger','t1',2,1,'challenger','bbbbbbbbbbbb',0,'hash',1790000260.0,1790000272.0,3.0,'SCORED',NULL,8,0,0.05,0.4,0.1,'{}',NULL);
INSERT INTO "slice" VALUES('t1-3-challenger','t1',3,0,'challenger','bbbbbbbbbbbb',1,'hash',1790000272.0,1790000284.0,3.0,'SCORED',NULL,8,0,0.05,0.4,0.1,'{}',NULL);
INSERT INTO "slice" VALUES('t1-3-champion','t1',3,1,'champion','aaaaaaaaaaaa',1,'hash',1790000284.0,1790000296.0,3.0,'SCORED',NULL,8,0,0.3,0.4,0.1,'{}',NULL);
INSERT INTO "slice" VALUES('t1-4-champion','t1',4,0,'champion','aaaaaaaaaaaa',0,'hash',1790000296.0,1790000308.0,3.0,'SCORED',NULL,8,0,0.3,0.4,0.1,'{}',NULL);
INSERT INTO "slice" VALUES('t1-4-challenger','t1',4,1,'challenger','bbbbbbbbbbbb',0,'hash',1790000308.0,1790000320.0,3.0,'SCORED',NULL,8,0,0.05,0.4,0.1,'{}',NULL);
INSERT INTO "slice" VALUES('h1-0-champion','h1',0,0,'champion','bbbbbbbbbbbb',0,'hash',1790000900.0,1790000912.0,3.0,'SCORED',NULL,8,0,0.05,0.4,0.1,'{}',NULL);
INSERT INTO "slice" VALUES('h1-0-challenger','h1',0,1,'challenger','aaaaaaaaaaaa',0,'hash',1790000912.0,1790000924.0,3.0,'SCORED',NULL,8,0,0.3,0.4,0.1,'{}',NULL);
CREATE TABLE snapshot (
	snapshot_id VARCHAR(32) NOT NULL, 
	created_at DOUBLE NOT NULL, 
	model JSON NOT NULL, 
	hardware JSON NOT NULL, 
	versions JSON NOT NULL, 
	knob_schema_version INTEGER NOT NULL, 
	knobs JSON NOT NULL, 
	CONSTRAINT pk_snapshot PRIMARY KEY (snapshot_id)
);
INSERT INTO "snapshot" VALUES('snap-1',1790000000.0,'{"name": "demo", "dtype": "float32", "num_parameters": 1000000}','{"device": "cpu", "device_name": "Some CPU", "num_cores": 4}','{"python": "3.11.7", "torch": "2.13.0"}',1,'[{"name": "prefill_chunk", "low": 16, "high": 16384}]');
CREATE TABLE study (
	study_id INTEGER NOT NULL, 
	snapshot_id VARCHAR(32) NOT NULL, 
	champion_config_id VARCHAR(16) NOT NULL, 
	created_at DOUBLE NOT NULL, 
	cause VARCHAR NOT NULL, 
	objective JSON NOT NULL, 
	space JSON NOT NULL, 
	seed INTEGER NOT NULL, 
	trust_steps INTEGER NOT NULL, 
	state VARCHAR NOT NULL, 
	ended_at DOUBLE, 
	reason VARCHAR, anomaly_id INTEGER, 
	CONSTRAINT pk_study PRIMARY KEY (study_id), 
	CONSTRAINT fk_study_champion_config_id_config FOREIGN KEY(champion_config_id) REFERENCES config (config_id), 
	CONSTRAINT fk_study_snapshot_id_snapshot FOREIGN KEY(snapshot_id) REFERENCES snapshot (snapshot_id)
);
INSERT INTO "study" VALUES(1,'snap-1','aaaaaaaaaaaa',1790000090.0,'p95 of e2e_s breached its SLO','{"metric": "e2e_s"}','{"prefill_chunk": [16, 512]}',7,1,'DONE',NULL,NULL,1);
CREATE TABLE trial (
	trial_id INTEGER NOT NULL, 
	study_id INTEGER NOT NULL, 
	proposal_id INTEGER NOT NULL, 
	config_id VARCHAR(16) NOT NULL, 
	state VARCHAR NOT NULL, 
	created_at DOUBLE NOT NULL, 
	value DOUBLE, 
	constraints JSON NOT NULL, 
	experiment_id VARCHAR, 
	ended_at DOUBLE, 
	reason VARCHAR, 
	CONSTRAINT pk_trial PRIMARY KEY (trial_id), 
	CONSTRAINT fk_trial_config_id_config FOREIGN KEY(config_id) REFERENCES config (config_id), 
	CONSTRAINT fk_trial_proposal_id_proposal FOREIGN KEY(proposal_id) REFERENCES proposal (proposal_id), 
	CONSTRAINT fk_trial_study_id_study FOREIGN KEY(study_id) REFERENCES study (study_id)
);
INSERT INTO "trial" VALUES(1,1,1,'bbbbbbbbbbbb','COMPLETE',1790000110.0,-0.25,'{}','p1',1790000150.0,NULL);
CREATE TABLE tuner_journal_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT tuner_journal_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "tuner_journal_version" VALUES('0002');
CREATE TABLE twin_fit (
	twin_fit_id INTEGER NOT NULL, 
	snapshot_id VARCHAR(32) NOT NULL, 
	config_id VARCHAR(16) NOT NULL, 
	fitted_at DOUBLE NOT NULL, 
	parameters JSON NOT NULL, 
	num_steps INTEGER NOT NULL, 
	step_error_ratio DOUBLE NOT NULL, 
	latency_error_ratio DOUBLE, 
	is_used BOOLEAN NOT NULL, 
	reason VARCHAR NOT NULL, 
	CONSTRAINT pk_twin_fit PRIMARY KEY (twin_fit_id), 
	CONSTRAINT fk_twin_fit_config_id_config FOREIGN KEY(config_id) REFERENCES config (config_id), 
	CONSTRAINT fk_twin_fit_snapshot_id_snapshot FOREIGN KEY(snapshot_id) REFERENCES snapshot (snapshot_id)
);
INSERT INTO "twin_fit" VALUES(1,'snap-1','aaaaaaaaaaaa',1790000080.0,'{"a": 1e-12}',500,0.04,0.07,1,'The twin is off by 7 %.');
CREATE TABLE verdict (
	verdict_id INTEGER NOT NULL, 
	experiment_id VARCHAR(40) NOT NULL, 
	decided_at DOUBLE NOT NULL, 
	outcome VARCHAR NOT NULL, 
	reason VARCHAR NOT NULL, 
	effect_ratio DOUBLE, 
	interval_low_ratio DOUBLE, 
	interval_high_ratio DOUBLE, 
	num_pairs INTEGER NOT NULL, 
	p_value DOUBLE, 
	level DOUBLE NOT NULL, 
	evidence JSON NOT NULL, 
	CONSTRAINT pk_verdict PRIMARY KEY (verdict_id), 
	CONSTRAINT fk_verdict_experiment_id_experiment FOREIGN KEY(experiment_id) REFERENCES experiment (experiment_id), 
	CONSTRAINT uq_verdict_experiment_id UNIQUE (experiment_id)
);
INSERT INTO "verdict" VALUES(1,'t1',1790000330.0,'PROMOTE','e2e_s fell by 22 %.',-2.21199216928595121522e-01,-0.3,-0.15,5,0.03125,0.05,'{"judgement": {"seen": {"requests_per_s": [0.9, 1.4], "mean_prompt_tokens": [80.0, 130.5], "mean_output_tokens": null}, "guardrails": [{"name": "errors", "passed": true, "detail": "0.00% of requests failed, champion 0.00%"}]}}');
CREATE INDEX slice_experiment ON slice (experiment_id, pair_index);
CREATE INDEX slice_state ON slice (state);
COMMIT;
PRAGMA user_version=2;
