{{/* What every container and pod of the relay has in common, wherever it runs. */}}

{{/* The settings as TOML. JSON's strings, numbers and lists are TOML's as well; toToml would write 5 as 5.0. */}}
{{- define "outbox-relay.toml" -}}
{{- range $name, $value := .Values.config }}
{{- if not (kindIs "map" $value) }}
{{- $name }} = {{ toJson $value }}
{{ end }}
{{- end }}
{{- range $table, $entries := .Values.config }}
{{- if kindIs "map" $entries }}
[{{ $table }}]
{{- range $name, $value := $entries }}
{{ toJson $name }} = {{ toJson $value }}
{{- end }}
{{ end }}
{{- end }}
{{- end }}

{{- define "outbox-relay.configChecksum" -}}
{{- include "outbox-relay.toml" . | sha256sum }}
{{- end }}

{{/* Sources of the volume of secrets. The relay reads those named as variables, libpq and librdkafka the others. */}}
{{- define "outbox-relay.secretSources" -}}
{{- include "outbox-relay.loginSource" .Values.database }}
{{- with .Values.kafka.sasl }}
{{- if .existingSecret }}
- secret:
    name: {{ .existingSecret }}
    items:
      {{- with .usernameKey }}
      - { key: {{ quote . }}, path: OUTBOX_RELAY_KAFKA__SASL_USERNAME }
      {{- end }}
      - { key: {{ quote .passwordKey }}, path: OUTBOX_RELAY_KAFKA__SASL_PASSWORD }
{{- end }}
{{- end }}
{{- /* libpq refuses a key that everybody may read; the group is the fsGroup of the pod. */}}
{{- include "outbox-relay.tlsSources" (dict "of" "database" "tls" .Values.database.tls "keyMode" "0440") }}
{{- include "outbox-relay.tlsSources" (dict "of" "kafka" "tls" .Values.kafka.tls) }}
{{- include "outbox-relay.tlsSources" (dict "of" "metrics" "tls" .Values.metrics.tls) }}
{{- end }}

{{- define "outbox-relay.loginSource" -}}
{{- with .existingSecret }}
- secret:
    name: {{ . }}
    items:
      - { key: {{ quote $.urlKey }}, path: OUTBOX_RELAY_DATABASE_URL }
{{- end }}
{{- end }}

{{- define "outbox-relay.tlsSources" -}}
{{- if .tls.caSecret }}
- secret:
    name: {{ .tls.caSecret }}
    items:
      - { key: {{ quote .tls.caKey }}, path: {{ .of }}-ca.crt }
{{- end }}
{{- if .tls.certificateSecret }}
- secret:
    name: {{ .tls.certificateSecret }}
    items:
      - { key: {{ quote .tls.certificateKey }}, path: {{ .of }}-tls.crt }
      - { key: {{ quote .tls.privateKeyKey }}, path: {{ .of }}-tls.key{{ with .keyMode }}, mode: {{ . }}{{ end }} }
{{- end }}
{{- end }}

{{/* Of the URL of metrics and probes. */}}
{{- define "outbox-relay.metricsScheme" -}}
{{- ternary "HTTPS" "HTTP" (or .Values.metrics.tls.certificateSecret .Values.config.metrics_certificate | empty | not) }}
{{- end }}

{{- define "outbox-relay.databaseAuthority" -}}
{{- if .Values.database.tls.caSecret -}}
- name: PGSSLMODE
  value: verify-full
- name: PGSSLROOTCERT
  value: /etc/outbox-relay/secrets/database-ca.crt
{{- end }}
{{- end }}

{{/* Fields of a container that runs a command of the relay with its settings and its login. */}}
{{- define "outbox-relay.container" -}}
image: {{ include "outbox-relay.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext: {{- toYaml .Values.securityContext | nindent 2 }}
env:
  - name: OUTBOX_RELAY_CONFIG
    value: /etc/outbox-relay/config/relay.toml
  - name: OUTBOX_RELAY_SECRETS_DIR
    value: /etc/outbox-relay/secrets
  - name: OUTBOX_RELAY_METRICS_PORT # the image has a default of its own, and a variable wins over the file
    value: {{ .Values.config.metrics_port | quote }}
  {{- with include "outbox-relay.databaseAuthority" . }}
  {{- nindent 2 . }}
  {{- end }}
  {{- if .Values.database.tls.certificateSecret }}
  - name: PGSSLCERT
    value: /etc/outbox-relay/secrets/database-tls.crt
  - name: PGSSLKEY
    value: /etc/outbox-relay/secrets/database-tls.key
  {{- end }}
  {{- if .Values.kafka.tls.caSecret }}
  - name: OUTBOX_RELAY_KAFKA__SSL_CA_LOCATION
    value: /etc/outbox-relay/secrets/kafka-ca.crt
  {{- end }}
  {{- if .Values.kafka.tls.certificateSecret }}
  - name: OUTBOX_RELAY_KAFKA__SSL_CERTIFICATE_LOCATION
    value: /etc/outbox-relay/secrets/kafka-tls.crt
  - name: OUTBOX_RELAY_KAFKA__SSL_KEY_LOCATION
    value: /etc/outbox-relay/secrets/kafka-tls.key
  {{- end }}
  {{- if .Values.metrics.tls.certificateSecret }}
  - name: OUTBOX_RELAY_METRICS_CERTIFICATE
    value: /etc/outbox-relay/secrets/metrics-tls.crt
  - name: OUTBOX_RELAY_METRICS_CERTIFICATE_KEY
    value: /etc/outbox-relay/secrets/metrics-tls.key
  {{- end }}
  {{- with .Values.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .Values.extraEnvFrom }}
envFrom: {{- toYaml . | nindent 2 }}
{{- end }}
volumeMounts:
  - { name: outbox-relay-config, mountPath: /etc/outbox-relay/config, readOnly: true }
  - { name: outbox-relay-secrets, mountPath: /etc/outbox-relay/secrets, readOnly: true }
  {{- with .Values.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- define "outbox-relay.volumes" -}}
- name: outbox-relay-config
  configMap:
    name: {{ include "outbox-relay.fullname" . }}
- name: outbox-relay-secrets
  projected:
    defaultMode: 0444 # only the relay's container mounts it, under a user that the pod may choose
    sources: {{- include "outbox-relay.secretSources" . | trim | default "[]" | nindent 6 }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Fields of the container that relays, in a pod of its own or beside an application. */}}
{{- define "outbox-relay.run" -}}
{{ include "outbox-relay.container" . }}
args: {{- concat (list "run") .Values.extraArgs | toYaml | nindent 2 }}
ports:
  - name: relay-metrics
    containerPort: {{ .Values.config.metrics_port }}
livenessProbe:
  httpGet: { path: /livez, port: relay-metrics, scheme: {{ include "outbox-relay.metricsScheme" . }} }
  {{- toYaml .Values.livenessProbe | nindent 2 }}
resources: {{- toYaml .Values.resources | nindent 2 }}
{{- end }}

{{/* Fields of the pods that are the relay's own. */}}
{{- define "outbox-relay.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
securityContext: {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- with .Values.extraInitContainers }}
initContainers: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
