{{/* What the schema of the values cannot say: rules between them, each broken one with its remedy. */}}
{{- define "outbox-relay.check" -}}
{{- $problems := list }}
{{- $kafka := .Values.config.kafka }}
{{- $protocol := index $kafka "security.protocol" | default "plaintext" | lower }}
{{- $hasVariables := or .Values.extraEnv .Values.extraEnvFrom }}
{{- range include "outbox-relay.secretProperties" . | fromJsonArray }}
  {{- if hasKey $kafka . }}
    {{- $problems = append $problems (printf "config.kafka.%q is a secret, and config goes into a ConfigMap: name a Secret in kafka.sasl or extraEnv instead" .) }}
  {{- end }}
{{- end }}
{{- if not (or $hasVariables (index $kafka "bootstrap.servers")) }}
  {{- $problems = append $problems `config.kafka."bootstrap.servers" is not set: name at least one broker, such as kafka:9092` }}
{{- end }}
{{- if not (or $hasVariables .Values.database.existingSecret) }}
  {{- $problems = append $problems "database.existingSecret is not set: name the Secret with the connection string, or set PG* variables in extraEnv" }}
{{- end }}
{{- if and .Values.kafka.sasl.existingSecret (not (hasPrefix "sasl_" $protocol)) }}
  {{- $problems = append $problems (printf "kafka.sasl is not used with the security.protocol %s: set config.kafka.\"security.protocol\" to SASL_SSL" $protocol) }}
{{- end }}
{{- if and (or .Values.kafka.tls.caSecret .Values.kafka.tls.certificateSecret) (not (hasSuffix "ssl" $protocol)) }}
  {{- $problems = append $problems (printf "kafka.tls is not used with the security.protocol %s: set config.kafka.\"security.protocol\" to SSL or SASL_SSL" $protocol) }}
{{- end }}
{{- if and (eq .Values.mode "daemon") (le (float64 .Values.terminationGracePeriodSeconds) (float64 .Values.config.drain_timeout)) }}
  {{- $problems = append $problems (printf "terminationGracePeriodSeconds is %v and must be above config.drain_timeout, which is %v: the relay would be killed while it finishes its batches" .Values.terminationGracePeriodSeconds .Values.config.drain_timeout) }}
{{- end }}
{{- with .Values.migrations }}
  {{- if and .enabled (not (or .existingSecret .extraEnv)) }}
    {{- $problems = append $problems "migrations.existingSecret is not set: name the Secret with the connection string of the tables' owner, or set PG* variables in migrations.extraEnv" }}
  {{- end }}
  {{- if and .inbox.enabled (not .inbox.existingSecret) }}
    {{- $problems = append $problems "migrations.inbox.existingSecret is not set: name the Secret with the connection string of the inbox tables' owner" }}
  {{- end }}
{{- end }}
{{- if and .Values.podMonitor.enabled (eq .Values.mode "sidecar") (not .Values.podMonitor.matchLabels) }}
  {{- $problems = append $problems "podMonitor.matchLabels is not set: with mode: sidecar name the labels of the application's pods" }}
{{- end }}
{{- if and .Values.serviceMonitor.enabled (not .Values.service.enabled) }}
  {{- $problems = append $problems "serviceMonitor.enabled needs service.enabled: enable it, or podMonitor instead" }}
{{- end }}
{{- if and .Values.keda.enabled (not .Values.keda.prometheusAddress) }}
  {{- $problems = append $problems "keda.prometheusAddress is not set: name the Prometheus that scrapes the relays" }}
{{- end }}
{{- with $problems }}
  {{- fail (printf "\n%s" (join "\n" .)) }}
{{- end }}
{{- end }}

{{/* Of librdkafka. */}}
{{- define "outbox-relay.secretProperties" -}}
[
  "sasl.oauthbearer.assertion.private.key.passphrase",
  "sasl.oauthbearer.assertion.private.key.pem",
  "sasl.oauthbearer.client.credentials.client.secret",
  "sasl.oauthbearer.client.secret",
  "sasl.oauthbearer.config",
  "sasl.password",
  "ssl.key.password",
  "ssl.key.pem",
  "ssl.keystore.password"
]
{{- end }}
