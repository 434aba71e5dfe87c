BEGIN TRANSACTION;
CREATE TABLE drain_cursor (
	boot_id VARCHAR(32) NOT NULL, 
	after_seq INTEGER NOT NULL, 
	num_dropped INTEGER NOT NULL, 
	updated_at DOUBLE NOT NULL, 
	CONSTRAINT pk_drain_cursor PRIMARY KEY (boot_id)
);
CREATE TABLE forecast (
	metric VARCHAR(64) NOT NULL, 
	at DOUBLE NOT NULL, 
	fitted_at DOUBLE NOT NULL, 
	expected DOUBLE NOT NULL, 
	low DOUBLE NOT NULL, 
	high DOUBLE NOT NULL, 
	CONSTRAINT pk_forecast PRIMARY KEY (metric, at)
);
CREATE TABLE forecast_fit (
	metric VARCHAR(64) NOT NULL, 
	state VARCHAR NOT NULL, 
	tried_at DOUBLE NOT NULL, 
	reason VARCHAR NOT NULL, 
	fitted_at DOUBLE, 
	num_points INTEGER NOT NULL, 
	history_s DOUBLE NOT NULL, 
	residual_scale DOUBLE, 
	is_log BOOLEAN NOT NULL, 
	fit_s DOUBLE NOT NULL, 
	CONSTRAINT pk_forecast_fit PRIMARY KEY (metric)
);
INSERT INTO "forecast_fit" VALUES('requests_per_s','FITTED',1790000450.0,'fitted on 7.5 min',1790000450.0,450,450.0,0.2,1,4.5);
CREATE TABLE request_timing (
	boot_id VARCHAR(32) NOT NULL, 
	seq INTEGER NOT NULL, 
	request_id VARCHAR NOT NULL, 
	arrived_at DOUBLE NOT NULL, 
	finished_at DOUBLE NOT NULL, 
	prompt_tokens INTEGER NOT NULL, 
	output_tokens INTEGER NOT NULL, 
	finish_reason VARCHAR NOT NULL, 
	admitted_at DOUBLE, 
	first_token_at DOUBLE, 
	error_kind VARCHAR, 
	config_id VARCHAR, 
	arrival_slice VARCHAR, 
	first_token_slice VARCHAR, 
	slices JSON NOT NULL, 
	gaps JSON NOT NULL, 
	num_preemptions INTEGER NOT NULL, 
	CONSTRAINT pk_request_timing PRIMARY KEY (boot_id, seq)
);
INSERT INTO "request_timing" VALUES('boot-1',1,'r1',1790000201.0,1790000253.0,100,11,'stop',NULL,1790000227.0,NULL,'aaaaaaaaaaaa','t1-0-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',2,'r2',1790000202.0,1790000254.1,100,11,'stop',NULL,1790000228.05,NULL,'aaaaaaaaaaaa','t1-0-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',3,'r3',1790000203.0,1790000205.2,100,11,'stop',NULL,1790000204.1,NULL,'aaaaaaaaaaaa','t1-0-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',4,'r4',1790000204.0,1790000206.3,100,11,'stop',NULL,1790000205.15,NULL,'aaaaaaaaaaaa','t1-0-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',5,'r5',1790000205.0,1790000207.4,100,11,'stop',NULL,1790000206.2,NULL,'aaaaaaaaaaaa','t1-0-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',6,'r6',1790000206.0,1790000208.5,100,11,'stop',NULL,1790000207.25,NULL,'aaaaaaaaaaaa','t1-0-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',7,'r7',1790000207.0,1790000209.6,100,11,'stop',NULL,1790000208.3,NULL,'aaaaaaaaaaaa','t1-0-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',8,'r8',1790000208.0,1790000210.7,100,11,'stop',NULL,1790000209.35,NULL,'aaaaaaaaaaaa','t1-0-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',9,'r9',1790000209.0,1790000211.8,100,11,'stop',NULL,1790000210.4,NULL,'aaaaaaaaaaaa','t1-0-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',10,'r10',1790000213.0,1790000264.5,100,11,'stop',NULL,1790000238.75,NULL,'bbbbbbbbbbbb','t1-0-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',11,'r11',1790000214.0,1790000265.6,100,11,'stop',NULL,1790000239.8,NULL,'bbbbbbbbbbbb','t1-0-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',12,'r12',1790000215.0,1790000216.7,100,11,'stop',NULL,1790000215.85,NULL,'bbbbbbbbbbbb','t1-0-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',13,'r13',1790000216.0,1790000217.8,100,11,'stop',NULL,1790000216.9,NULL,'bbbbbbbbbbbb','t1-0-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',14,'r14',1790000217.0,1790000218.9,100,11,'stop',NULL,1790000217.95,NULL,'bbbbbbbbbbbb','t1-0-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',15,'r15',1790000218.0,1790000220.0,100,11,'stop',NULL,1790000219.0,NULL,'bbbbbbbbbbbb','t1-0-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',16,'r16',1790000219.0,1790000221.1,100,11,'stop',NULL,1790000220.05,NULL,'bbbbbbbbbbbb','t1-0-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',17,'r17',1790000220.0,1790000222.2,100,11,'stop',NULL,1790000221.1,NULL,'bbbbbbbbbbbb','t1-0-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',18,'r18',1790000221.0,1790000223.3,100,11,'stop',NULL,1790000222.15,NULL,'bbbbbbbbbbbb','t1-0-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',19,'r19',1790000225.0,1790000276.5,100,11,'stop',NULL,1790000250.75,NULL,'bbbbbbbbbbbb','t1-1-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',20,'r20',1790000226.0,1790000277.6,100,11,'stop',NULL,1790000251.8,NULL,'bbbbbbbbbbbb','t1-1-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',21,'r21',1790000227.0,1790000228.7,100,11,'stop',NULL,1790000227.85,NULL,'bbbbbbbbbbbb','t1-1-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',22,'r22',1790000228.0,1790000229.8,100,11,'stop',NULL,1790000228.9,NULL,'bbbbbbbbbbbb','t1-1-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',23,'r23',1790000229.0,1790000230.9,100,11,'stop',NULL,1790000229.95,NULL,'bbbbbbbbbbbb','t1-1-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',24,'r24',1790000230.0,1790000232.0,100,11,'stop',NULL,1790000231.0,NULL,'bbbbbbbbbbbb','t1-1-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',25,'r25',1790000231.0,1790000233.1,100,11,'stop',NULL,1790000232.05,NULL,'bbbbbbbbbbbb','t1-1-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',26,'r26',1790000232.0,1790000234.2,100,11,'stop',NULL,1790000233.1,NULL,'bbbbbbbbbbbb','t1-1-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',27,'r27',1790000233.0,1790000235.3,100,11,'stop',NULL,1790000234.15,NULL,'bbbbbbbbbbbb','t1-1-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',28,'r28',1790000237.0,1790000289.0,100,11,'stop',NULL,1790000263.0,NULL,'aaaaaaaaaaaa','t1-1-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',29,'r29',1790000238.0,1790000290.1,100,11,'stop',NULL,1790000264.05,NULL,'aaaaaaaaaaaa','t1-1-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',30,'r30',1790000239.0,1790000241.2,100,11,'stop',NULL,1790000240.1,NULL,'aaaaaaaaaaaa','t1-1-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',31,'r31',1790000240.0,1790000242.3,100,11,'stop',NULL,1790000241.15,NULL,'aaaaaaaaaaaa','t1-1-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',32,'r32',1790000241.0,1790000243.4,100,11,'stop',NULL,1790000242.2,NULL,'aaaaaaaaaaaa','t1-1-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',33,'r33',1790000242.0,1790000244.5,100,11,'stop',NULL,1790000243.25,NULL,'aaaaaaaaaaaa','t1-1-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',34,'r34',1790000243.0,1790000245.6,100,11,'stop',NULL,1790000244.3,NULL,'aaaaaaaaaaaa','t1-1-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',35,'r35',1790000244.0,1790000246.7,100,11,'stop',NULL,1790000245.35,NULL,'aaaaaaaaaaaa','t1-1-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',36,'r36',1790000245.0,1790000247.8,100,11,'stop',NULL,1790000246.4,NULL,'aaaaaaaaaaaa','t1-1-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',37,'r37',1790000249.0,1790000301.0,100,11,'stop',NULL,1790000275.0,NULL,'aaaaaaaaaaaa','t1-2-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',38,'r38',1790000250.0,1790000302.1,100,11,'stop',NULL,1790000276.05,NULL,'aaaaaaaaaaaa','t1-2-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',39,'r39',1790000251.0,1790000253.2,100,11,'stop',NULL,1790000252.1,NULL,'aaaaaaaaaaaa','t1-2-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',40,'r40',1790000252.0,1790000254.3,100,11,'stop',NULL,1790000253.15,NULL,'aaaaaaaaaaaa','t1-2-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',41,'r41',1790000253.0,1790000255.4,100,11,'stop',NULL,1790000254.2,NULL,'aaaaaaaaaaaa','t1-2-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',42,'r42',1790000254.0,1790000256.5,100,11,'stop',NULL,1790000255.25,NULL,'aaaaaaaaaaaa','t1-2-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',43,'r43',1790000255.0,1790000257.6,100,11,'stop',NULL,1790000256.3,NULL,'aaaaaaaaaaaa','t1-2-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',44,'r44',1790000256.0,1790000258.7,100,11,'stop',NULL,1790000257.35,NULL,'aaaaaaaaaaaa','t1-2-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',45,'r45',1790000257.0,1790000259.8,100,11,'stop',NULL,1790000258.4,NULL,'aaaaaaaaaaaa','t1-2-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',46,'r46',1790000261.0,1790000312.5,100,11,'stop',NULL,1790000286.75,NULL,'bbbbbbbbbbbb','t1-2-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',47,'r47',1790000262.0,1790000313.6,100,11,'stop',NULL,1790000287.8,NULL,'bbbbbbbbbbbb','t1-2-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',48,'r48',1790000263.0,1790000264.7,100,11,'stop',NULL,1790000263.85,NULL,'bbbbbbbbbbbb','t1-2-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',49,'r49',1790000264.0,1790000265.8,100,11,'stop',NULL,1790000264.9,NULL,'bbbbbbbbbbbb','t1-2-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',50,'r50',1790000265.0,1790000266.9,100,11,'stop',NULL,1790000265.95,NULL,'bbbbbbbbbbbb','t1-2-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',51,'r51',1790000266.0,1790000268.0,100,11,'stop',NULL,1790000267.0,NULL,'bbbbbbbbbbbb','t1-2-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',52,'r52',1790000267.0,1790000269.1,100,11,'stop',NULL,1790000268.05,NULL,'bbbbbbbbbbbb','t1-2-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',53,'r53',1790000268.0,1790000270.2,100,11,'stop',NULL,1790000269.1,NULL,'bbbbbbbbbbbb','t1-2-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',54,'r54',1790000269.0,1790000271.3,100,11,'stop',NULL,1790000270.15,NULL,'bbbbbbbbbbbb','t1-2-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',55,'r55',1790000273.0,1790000324.5,100,11,'stop',NULL,1790000298.75,NULL,'bbbbbbbbbbbb','t1-3-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',56,'r56',1790000274.0,1790000325.6,100,11,'stop',NULL,1790000299.8,NULL,'bbbbbbbbbbbb','t1-3-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',57,'r57',1790000275.0,1790000276.7,100,11,'stop',NULL,1790000275.85,NULL,'bbbbbbbbbbbb','t1-3-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',58,'r58',1790000276.0,1790000277.8,100,11,'stop',NULL,1790000276.9,NULL,'bbbbbbbbbbbb','t1-3-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',59,'r59',1790000277.0,1790000278.9,100,11,'stop',NULL,1790000277.95,NULL,'bbbbbbbbbbbb','t1-3-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',60,'r60',1790000278.0,1790000280.0,100,11,'stop',NULL,1790000279.0,NULL,'bbbbbbbbbbbb','t1-3-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',61,'r61',1790000279.0,1790000281.1,100,11,'stop',NULL,1790000280.05,NULL,'bbbbbbbbbbbb','t1-3-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',62,'r62',1790000280.0,1790000282.2,100,11,'stop',NULL,1790000281.1,NULL,'bbbbbbbbbbbb','t1-3-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',63,'r63',1790000281.0,1790000283.3,100,11,'stop',NULL,1790000282.15,NULL,'bbbbbbbbbbbb','t1-3-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',64,'r64',1790000285.0,1790000337.0,100,11,'stop',NULL,1790000311.0,NULL,'aaaaaaaaaaaa','t1-3-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',65,'r65',1790000286.0,1790000338.1,100,11,'stop',NULL,1790000312.05,NULL,'aaaaaaaaaaaa','t1-3-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',66,'r66',1790000287.0,1790000289.2,100,11,'stop',NULL,1790000288.1,NULL,'aaaaaaaaaaaa','t1-3-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',67,'r67',1790000288.0,1790000290.3,100,11,'stop',NULL,1790000289.15,NULL,'aaaaaaaaaaaa','t1-3-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',68,'r68',1790000289.0,1790000291.4,100,11,'stop',NULL,1790000290.2,NULL,'aaaaaaaaaaaa','t1-3-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',69,'r69',1790000290.0,1790000292.5,100,11,'stop',NULL,1790000291.25,NULL,'aaaaaaaaaaaa','t1-3-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',70,'r70',1790000291.0,1790000293.6,100,11,'stop',NULL,1790000292.3,NULL,'aaaaaaaaaaaa','t1-3-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',71,'r71',1790000292.0,1790000294.7,100,11,'stop',NULL,1790000293.35,NULL,'aaaaaaaaaaaa','t1-3-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',72,'r72',1790000293.0,1790000295.8,100,11,'stop',NULL,1790000294.4,NULL,'aaaaaaaaaaaa','t1-3-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',73,'r73',1790000297.0,1790000349.0,100,11,'stop',NULL,1790000323.0,NULL,'aaaaaaaaaaaa','t1-4-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',74,'r74',1790000298.0,1790000350.1,100,11,'stop',NULL,1790000324.05,NULL,'aaaaaaaaaaaa','t1-4-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',75,'r75',1790000299.0,1790000301.2,100,11,'stop',NULL,1790000300.1,NULL,'aaaaaaaaaaaa','t1-4-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',76,'r76',1790000300.0,1790000302.3,100,11,'stop',NULL,1790000301.15,NULL,'aaaaaaaaaaaa','t1-4-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',77,'r77',1790000301.0,1790000303.4,100,11,'stop',NULL,1790000302.2,NULL,'aaaaaaaaaaaa','t1-4-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',78,'r78',1790000302.0,1790000304.5,100,11,'stop',NULL,1790000303.25,NULL,'aaaaaaaaaaaa','t1-4-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',79,'r79',1790000303.0,1790000305.6,100,11,'stop',NULL,1790000304.3,NULL,'aaaaaaaaaaaa','t1-4-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',80,'r80',1790000304.0,1790000306.7,100,11,'stop',NULL,1790000305.35,NULL,'aaaaaaaaaaaa','t1-4-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',81,'r81',1790000305.0,1790000307.8,100,11,'stop',NULL,1790000306.4,NULL,'aaaaaaaaaaaa','t1-4-champion',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',82,'r82',1790000309.0,1790000360.5,100,11,'stop',NULL,1790000334.75,NULL,'bbbbbbbbbbbb','t1-4-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',83,'r83',1790000310.0,1790000361.6,100,11,'stop',NULL,1790000335.8,NULL,'bbbbbbbbbbbb','t1-4-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',84,'r84',1790000311.0,1790000312.7,100,11,'stop',NULL,1790000311.85,NULL,'bbbbbbbbbbbb','t1-4-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',85,'r85',1790000312.0,1790000313.8,100,11,'stop',NULL,1790000312.9,NULL,'bbbbbbbbbbbb','t1-4-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',86,'r86',1790000313.0,1790000314.9,100,11,'stop',NULL,1790000313.95,NULL,'bbbbbbbbbbbb','t1-4-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',87,'r87',1790000314.0,1790000316.0,100,11,'stop',NULL,1790000315.0,NULL,'bbbbbbbbbbbb','t1-4-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',88,'r88',1790000315.0,1790000317.1,100,11,'stop',NULL,1790000316.05,NULL,'bbbbbbbbbbbb','t1-4-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',89,'r89',1790000316.0,1790000318.2,100,11,'stop',NULL,1790000317.1,NULL,'bbbbbbbbbbbb','t1-4-challenger',NULL,'{}','{}',0);
INSERT INTO "request_timing" VALUES('boot-1',90,'r90',1790000317.0,1790000319.3,100,11,'stop',NULL,1790000318.15,NULL,'bbbbbbbbbbbb','t1-4-challenger',NULL,'{}','{}',0);
CREATE TABLE runtime_event (
	boot_id VARCHAR(32) NOT NULL, 
	seq INTEGER NOT NULL, 
	at DOUBLE NOT NULL, 
	kind VARCHAR NOT NULL, 
	details JSON NOT NULL, 
	CONSTRAINT pk_runtime_event PRIMARY KEY (boot_id, seq)
);
CREATE TABLE sample (
	metric VARCHAR(64) NOT NULL, 
	label VARCHAR(32) NOT NULL, 
	at DOUBLE NOT NULL, 
	value DOUBLE NOT NULL, 
	config_id VARCHAR, 
	CONSTRAINT pk_sample PRIMARY KEY (metric, label, at)
)
 WITHOUT ROWID

;
CREATE TABLE sample_rollup (
	metric VARCHAR(64) NOT NULL, 
	label VARCHAR(32) NOT NULL, 
	bin_s INTEGER NOT NULL, 
	at DOUBLE NOT NULL, 
	num_samples INTEGER NOT NULL, 
	mean DOUBLE NOT NULL, 
	low DOUBLE NOT NULL, 
	high DOUBLE NOT NULL, 
	config_id VARCHAR, 
	CONSTRAINT pk_sample_rollup PRIMARY KEY (metric, label, bin_s, at)
)
 WITHOUT ROWID

;
INSERT INTO "sample_rollup" VALUES('e2e_s','p95',60,1790000000.0,60,2.5,1.9,3.1,'aaaaaaaaaaaa');
INSERT INTO "sample_rollup" VALUES('e2e_s','p95',3600,1790000000.0,3600,2.2,1.5,3.1,NULL);
CREATE TABLE step (
	boot_id VARCHAR(32) NOT NULL, 
	seq INTEGER NOT NULL, 
	at DOUBLE NOT NULL, 
	step_s DOUBLE NOT NULL, 
	forward_s DOUBLE NOT NULL, 
	num_decode INTEGER NOT NULL, 
	num_prefill_rows INTEGER NOT NULL, 
	num_prefill_tokens INTEGER NOT NULL, 
	context_tokens INTEGER NOT NULL, 
	attention_pairs INTEGER NOT NULL, 
	num_running INTEGER NOT NULL, 
	num_waiting INTEGER NOT NULL, 
	kv_used_tokens INTEGER NOT NULL, 
	threads INTEGER NOT NULL, 
	config_id VARCHAR NOT NULL, 
	slice_id VARCHAR, device_s DOUBLE, graph_rows INTEGER, 
	CONSTRAINT pk_step PRIMARY KEY (boot_id, seq)
);
CREATE TABLE tuner_metrics_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT tuner_metrics_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "tuner_metrics_version" VALUES('0003');
CREATE INDEX request_timing_arrived ON request_timing (arrived_at);
CREATE INDEX request_timing_slice ON request_timing (arrival_slice);
CREATE INDEX step_at ON step (at);
COMMIT;
PRAGMA user_version=3;
